"""One image file -> the pixels that CLIP sees."""

from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import BinaryIO

import numpy as np
import open_clip
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torchvision.transforms import Compose

from clipsae.errors import ConfigError

# A strip 1 pixel wide and 5,000 long would be resized to 224 x 1,120,000.
_LONGEST_ASPECT = 200
# What `preprocessing` does before it crops the centre.
RESIZE = {"resize_mode": "shortest", "interpolation": "bicubic"}
# Formats whose mode "I" is 16 bits from black to white; in any other 32 bits have no known white.
_SIXTEEN_BITS = ("PNG", "PPM")
_BITS_PER_SAMPLE = 258  # a tag of TIFF


class BadImageError(ConfigError):
    """A file that cannot be read as an image; the message names it and says why."""


@cache
def preprocessing(image_size: int) -> Compose:
    """open_clip's own evaluation transform up to the PIL image: resize the short side (bicubic),
    crop the centre, convert to RGB. What is left, scaling to [0, 1] and normalising, is done on
    the device (`FrozenCLIP.normalize`)."""
    whole = open_clip.image_transform(image_size, is_train=False, **RESIZE)
    return Compose(whole.transforms[:-2])


def read_image(path: Path | str | BinaryIO, image_size: int, *, as_seen: bool = True) -> Tensor:
    """Read an image file of any format and colour space that Pillow knows; of several frames the
    first.

    Grey levels of 16 bits become 8 by their upper byte, CMYK and the like are converted by
    Pillow's formulas; colour profiles are not applied.

    Args:
        path: of a file in any format that Pillow reads, or such a file, opened.
        image_size: S; the short side is resized to it (bicubic) and the centre cropped.
        as_seen: as a person sees it in a viewer: turned as its EXIF tag says, transparent parts
            on white, palettes in colour before they are resized. False: as open_clip's transform
            leaves it, which is what published numbers rest on.

    Returns:
        uint8 [3, S, S].

    Raises:
        BadImageError: not an image, truncated, not readable, absurdly long, or of numbers that
            have no defined value range (32-bit integers, floats).
    """
    try:
        with Image.open(path) as image:
            _check(image)
            image.load()
            seen = _as_seen(image) if as_seen else _in_eight_bits(image)
            pixels = np.array(preprocessing(image_size)(seen))
    except Exception as error:  # Pillow's decoders raise anything on broken data
        name = path if isinstance(path, Path | str) else "the picture"
        raise BadImageError(f"{name}: {_reason(error)}") from error
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def _reason(error: Exception) -> str:
    """Why an image cannot be read."""
    if isinstance(error, FileNotFoundError):
        return "no such file"
    if isinstance(error, UnidentifiedImageError):
        return "not an image that Pillow can read"
    return str(error) if isinstance(error, _Unusable) else f"cannot be decoded ({error})"


class _Unusable(ValueError):
    """Why an image that can be decoded is of no use."""


def _check(image: Image.Image) -> None:
    """Refuse what its header already says is of no use."""
    width, height = image.size
    if max(width, height) > _LONGEST_ASPECT * min(width, height):
        raise _Unusable(f"{width} x {height} pixels is too long for a crop")
    if image.mode == "F" or (image.mode == "I" and image.format not in _SIXTEEN_BITS):
        kind = "floats" if image.mode == "F" else "32-bit integers"
        raise _Unusable(f"{kind} have no defined value range: save it with 8 or 16 bits")


def _in_eight_bits(image: Image.Image) -> Image.Image:
    """Grey levels of 16 bits by their upper byte; any other image as it is.

    Pillow would clip them at 255: nearly all white.
    """
    if not image.mode.startswith("I"):
        return image
    bits = 16
    if image.format == "TIFF":
        bits = image.tag_v2.get(_BITS_PER_SAMPLE, (bits,))[0]  # 12 of a microscope's
    deep = np.asarray(image).clip(0, 2**bits - 1)
    return Image.fromarray((deep >> (bits - 8)).astype(np.uint8))


def _as_seen(image: Image.Image) -> Image.Image:
    """An image that has been loaded, as RGB of what a viewer shows."""
    with suppress(Exception):  # a broken EXIF tag makes Pillow raise anything
        ImageOps.exif_transpose(image, in_place=True)
    shown = _in_eight_bits(image)
    if shown.mode == "La":  # which converts to nothing else
        shown = shown.convert("LA")
    if shown.has_transparency_data:
        shown = shown.convert("RGBA")
        shown = Image.alpha_composite(Image.new("RGBA", shown.size, "white"), shown)
    return shown if shown.mode == "RGB" else shown.convert("RGB")

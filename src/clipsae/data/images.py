"""One image file -> the pixels that CLIP sees."""

from pathlib import Path

import numpy as np
import open_clip
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torchvision.transforms import Compose

# A strip 1 pixel wide and 5,000 long would be resized to 224 x 1,120,000.
_LONGEST_ASPECT = 200


class BadImageError(ValueError):
    """A file that cannot be read as an image; the message names it and says why."""


def preprocessing(image_size: int) -> Compose:
    """open_clip's own evaluation transform up to the PIL image: resize the short side (bicubic),
    crop the centre, convert to RGB. What is left, scaling to [0, 1] and normalising, is done on
    the device (`FrozenCLIP.normalize`)."""
    whole = open_clip.image_transform(
        image_size, is_train=False, resize_mode="shortest", interpolation="bicubic"
    )
    return Compose(whole.transforms[:-2])


def read_image(path: Path, transform: Compose) -> Tensor:
    """Read an image file of any format and colour space.

    Args:
        path: JPEG, PNG or whatever Pillow reads; grayscale, CMYK, palette and 16 bit are converted.
        transform: `preprocessing(S)`.

    Returns:
        uint8 [3, S, S].

    Raises:
        BadImageError: not an image, truncated, not readable, or absurdly long.
    """
    try:
        with Image.open(path) as image:
            width, height = image.size
            if max(width, height) > _LONGEST_ASPECT * min(width, height):
                raise BadImageError(f"{path}: {width} x {height} pixels is too long for a crop")
            if image.mode.startswith("I"):  # 16 bits; older Pillows call some of them 32
                # Pillow would clip them at 255: nearly all white.
                deep = np.asarray(image).clip(0, 65535)
                image = Image.fromarray((deep >> 8).astype(np.uint8))
            pixels = np.array(transform(image))
    except BadImageError:
        raise
    except FileNotFoundError as error:
        raise BadImageError(f"{path}: no such file") from error
    except UnidentifiedImageError as error:
        raise BadImageError(f"{path}: not an image that Pillow can read") from error
    except Exception as error:  # on broken data Pillow's decoders raise whatever they stumble over
        raise BadImageError(f"{path}: cannot be decoded ({error})") from error
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()

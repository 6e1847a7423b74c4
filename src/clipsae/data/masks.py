"""Images with a mask of classes each, for measurements of where latents are active.

A mask is an image of one channel whose values are indices of classes, of the size of its image. It
is resized (to the nearest pixel) and cropped exactly as the image is.
"""

from collections.abc import Collection, Sequence
from functools import cache, cached_property
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Resize

from clipsae.data.dataset import ImageList, OnBadImage, check_choice
from clipsae.data.images import BadImageError
from clipsae.data.listing import list_images

# Of a patch that its commonest class must cover to be its class, as in the built-in scenes.
LEAST_COVERAGE = 0.25
_SPLITS = {"train": ("train", "training"), "test": ("test", "val", "validation")}
_VOC = (
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("dining table", "dog", "horse", "motorbike", "person", "potted plant", "sheep", "sofa"),
    *("train", "tv monitor"),
)


@cache
def _preprocessing(image_size: int) -> Compose:
    """`images.preprocessing` for a mask."""
    nearest = InterpolationMode.NEAREST
    return Compose([Resize(image_size, interpolation=nearest), CenterCrop(image_size)])


class MaskList(ImageList):
    """A dataset that is a list of images, each with a mask.

    Whole images have no class: all labels are 0. It is measured with `evaluation=none`.

    Args:
        root: the folder that the paths are relative to.
        files, masks: N relative paths each.
        names: of the classes with index 1, 2, ... in the masks.
        ignored: indices that stand for no class.
        image_size: S.
        on_bad_image: see `ImageList`; the masks must be readable.

    Attributes:
        concepts: {"class": names}.
    """

    def __init__(
        self,
        root: Path,
        files: Sequence[str],
        masks: Sequence[str],
        names: Sequence[str],
        *,
        ignored: Collection[int] = (0, 255),
        image_size: int = 224,
        on_bad_image: OnBadImage = "error",
    ) -> None:
        label = [0] * len(files)
        super().__init__(
            root,
            files,
            label,
            ["image"],
            image_size=image_size,
            on_bad_image=on_bad_image,
            as_seen=False,  # a mask is not turned by its image's EXIF tag
        )
        self.masks = ImageList(root, masks, label, [*names])
        self.ignored = set(ignored)
        self.concepts = {"class": tuple(names)}

    @cached_property
    def fingerprint(self) -> str:
        """Of the images, the masks, the classes' names and what is ignored."""
        ignored = ",".join(map(str, sorted(self.ignored)))
        return f"{super().fingerprint}-{self.masks.fingerprint}-{ignored}"

    def mask(self, index: int) -> Tensor:
        """What each pixel of an image shows, as CLIP sees it: LongTensor [S, S], an index into
        `concepts["class"]`, -1 where that is no class.

        Raises:
            BadImageError: the mask cannot be read, is not of its image's size, has an index
                without a name, or is in colour.
        """
        file, path = self.root / self.files[index], self.root / self.masks.files[index]
        try:
            with Image.open(file) as image, Image.open(path) as mask:
                size, of_mask, mode = image.size, mask.size, mask.mode
                indices = np.array(_preprocessing(self.image_size)(mask), dtype=np.int64)
        except Exception as error:  # Pillow's decoders raise anything on broken data
            raise BadImageError(
                f"{path}: cannot be read as the mask of {file} ({error})"
            ) from error
        if size != of_mask:
            raise BadImageError(
                f"{path}: {of_mask[0]} x {of_mask[1]} pixels, and its image has {size[0]} x "
                f"{size[1]}: expected a mask of the same size"
            )
        if indices.ndim != 2:
            raise BadImageError(
                f"{path}: a mask of mode {mode}: expected one channel of indices of classes, such "
                "as a PNG with a palette or grey levels"
            )
        names = len(self.concepts["class"])
        indices[np.isin(indices, list(self.ignored))] = 0
        if indices.max() > names or indices.min() < 0:
            raise BadImageError(
                f"{path}: has the index {indices.max()}: expected 1 to {names}, the classes with a "
                "name, or one that is ignored"
            )
        return torch.from_numpy(indices) - 1

    def patch_truth(
        self, indices: Sequence[int] | Tensor, grid: int, min_coverage: float = LEAST_COVERAGE
    ) -> dict[str, Tensor]:
        """What is in each patch of a grid x grid, row by row.

        Returns:
            `class` [n, grid^2]: the class of most of the patch's pixels (the first of equals), -1
            where that is no class or covers less than `min_coverage`; `coverage` [n, grid^2]: how
            much of the patch its commonest class covers, 0..1.
        """
        names, side = len(self.concepts["class"]), self.image_size
        along = torch.arange(side) * grid // side  # a pixel's patch
        patch = along[:, None] * grid + along
        pixels = patch.flatten().bincount(minlength=grid * grid).clamp(min=1)
        labels, covered = [], []
        for index in torch.as_tensor(indices).tolist():
            shown = self.mask(index)
            there = shown >= 0
            counts = torch.bincount(
                patch[there] * names + shown[there], minlength=grid * grid * names
            ).view(-1, names)
            most = counts.amax(dim=1)
            share = most / pixels
            # Of equals the first, which `max` does not promise.
            label = (counts == most[:, None]).int().argmax(dim=1)
            labels.append(label.masked_fill((share < min_coverage) | (most == 0), -1))
            covered.append(share)
        nothing = torch.zeros(0, grid * grid)
        return {
            "class": torch.stack(labels) if labels else nothing.long(),
            "coverage": torch.stack(covered) if covered else nothing,
        }


class MaskFolder(MaskList):
    """`root/images/` and `root/masks/` with the same names but for the ending, and
    `root/classes.txt`: the names of the classes 1, 2, ..., one a line.

    Where both have folders for splits (train or training; test, val or validation) each split has
    its own images, else both have all.

    Raises:
        FileNotFoundError: no such folder or file.
        ValueError: no images, an image without a mask, no names, an unknown option.
    """

    def __init__(
        self,
        root: Path | str,
        split: str = "test",
        *,
        image_size: int = 224,
        ignored: Collection[int] = (0, 255),
        on_bad_image: OnBadImage = "error",
    ) -> None:
        root = _existing(Path(root).expanduser(), "images", "masks", "classes.txt")
        names = [line.strip() for line in (root / "classes.txt").read_text().splitlines()]
        files, masks = _pairs(root, "images", "masks", split)
        super().__init__(
            root,
            files,
            masks,
            [name for name in names if name],
            ignored=ignored,
            image_size=image_size,
            on_bad_image=on_bad_image,
        )


class ADE20K(MaskList):
    """ADE20K as MIT's scene parsing benchmark has it (ADEChallengeData2016): 150 classes, 0 is
    anything else. Its validation images are the test split.

    Args:
        root: the folder with `images/{training,validation}`, `annotations/{training,validation}`
            and `objectInfo150.txt`, or the one that holds it.

    Raises:
        FileNotFoundError, ValueError: see `MaskFolder`.
    """

    def __init__(
        self,
        root: Path | str,
        split: str = "test",
        *,
        image_size: int = 224,
        on_bad_image: OnBadImage = "error",
    ) -> None:
        root = _inner(Path(root).expanduser(), "ADEChallengeData2016")
        root = _existing(root, "images", "annotations", "objectInfo150.txt")
        lines = (root / "objectInfo150.txt").read_text(encoding="utf-8").splitlines()[1:]
        full = [line.split("\t")[-1].strip() for line in lines if line.strip()]
        short = [name.split(",")[0].strip() for name in full]
        names = [s if short.count(s) == 1 else f for s, f in zip(short, full, strict=True)]
        files, masks = _pairs(root, "images", "annotations", split)
        super().__init__(
            root,
            files,
            masks,
            names,
            ignored=(0,),
            image_size=image_size,
            on_bad_image=on_bad_image,
        )


class PascalVOC(MaskList):
    """The segmentation part of Pascal VOC 2012: 20 classes; 0 is background and 255 void. Its `val`
    is the test split.

    Args:
        root: the folder with `JPEGImages`, `SegmentationClass` and `ImageSets/Segmentation`, or one
            above it (`VOCdevkit`, or what holds that).

    Raises:
        FileNotFoundError, ValueError: see `MaskFolder`.
    """

    def __init__(
        self,
        root: Path | str,
        split: str = "test",
        *,
        image_size: int = 224,
        on_bad_image: OnBadImage = "error",
    ) -> None:
        check_choice("split", split, "train", "test")
        root = _inner(_inner(Path(root).expanduser(), "VOCdevkit"), "VOC2012")
        listed = f"ImageSets/Segmentation/{'train' if split == 'train' else 'val'}.txt"
        root = _existing(root, "JPEGImages", "SegmentationClass", listed)
        stems = (root / listed).read_text().split()
        super().__init__(
            root,
            [f"JPEGImages/{stem}.jpg" for stem in stems],
            [f"SegmentationClass/{stem}.png" for stem in stems],
            _VOC,
            image_size=image_size,
            on_bad_image=on_bad_image,
        )


def _inner(root: Path, name: str) -> Path:
    return root / name if (root / name).is_dir() else root


def _existing(root: Path, *parts: str) -> Path:
    """The folder, if it has all these parts."""
    if not root.is_dir():
        raise FileNotFoundError(f"dataset.root={root}: there is no such folder")
    if absent := [part for part in parts if not (root / part).exists()]:
        raise FileNotFoundError(
            f"dataset.root={root}: lacks {absent[0]}; expected in it are {', '.join(parts)}"
        )
    return root


def _pairs(root: Path, images: str, masks: str, split: str) -> tuple[list[str], list[str]]:
    """The images of a split and their masks, relative to the root, sorted."""
    check_choice("split", split, "train", "test")
    inside = {one: _split_folder(root, images, masks, one) for one in _SPLITS}
    below = f"/{inside[split]}" if all(inside.values()) else ""
    by_stem = {
        Path(name).with_suffix(""): f"{masks}{below}/{name}"
        for name in list_images(root / f"{masks}{below}")
    }
    files = list_images(root / f"{images}{below}")
    if absent := [name for name in files if Path(name).with_suffix("") not in by_stem]:
        raise ValueError(
            f"dataset.root={root}: {len(absent)} of {len(files)} images have no mask in "
            f"{masks}{below}, such as {absent[0]}: expected a file of the same name but for the "
            "ending"
        )
    return (
        [f"{images}{below}/{name}" for name in files],
        [by_stem[Path(name).with_suffix("")] for name in files],
    )


def _split_folder(root: Path, images: str, masks: str, split: str) -> str:
    both = (root / images, root / masks)
    return next((n for n in _SPLITS[split] if all((x / n).is_dir() for x in both)), "")

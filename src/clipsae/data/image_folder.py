"""Any folder of class folders as a dataset."""

import logging
import os
from functools import cache
from importlib.resources import files as package_files
from pathlib import Path
from typing import Literal

from open_clip import IMAGENET_CLASSNAMES

from clipsae.data.dataset import ImageList, OnBadImage, list_images

log = logging.getLogger(__name__)

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
_SPLIT_FOLDERS = {"train": ("train",), "test": ("test", "val")}


class ImageFolder(ImageList):
    """`root/<class>/**/*.jpg`, or `root/train/<class>/...` and `root/test` (or `val`).

    A root without split folders serves both splits with the same images: the published protocol
    counts and evaluates on the same ones.

    Folders named by ImageNet's wnids are ImageNet's classes: labels are its indices 0..999, and
    names are open_clip's. Otherwise classes are the folders in sorted order.

    Args:
        root: the folder.
        split: "train" or "test".
        image_size: S.
        classnames: "clean": underscores are spaces, wnids are names; "raw": as the folders are
            spelled.
        on_bad_image: see `ImageList`.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: not a folder, no class folders in it, no images in them, an unknown option.
    """

    def __init__(
        self,
        root: Path | str,
        split: str = "test",
        *,
        image_size: int = 224,
        classnames: Literal["clean", "raw"] = "clean",
        on_bad_image: OnBadImage = "error",
    ) -> None:
        if classnames not in ("clean", "raw"):
            raise ValueError(f"classnames={classnames!r}: expected clean or raw")
        if split not in _SPLIT_FOLDERS:
            raise ValueError(f"split={split!r}: expected train or test")
        root = Path(root).expanduser()
        if not root.exists():
            raise FileNotFoundError(f"dataset.root={root}: there is no such folder")
        if not root.is_dir():
            raise ValueError(f"dataset.root={root}: expected a folder of class folders, not a file")
        found = [root / name for name in _SPLIT_FOLDERS[split] if (root / name).is_dir()]
        folder = found[0] if found else root
        classes = sorted(e.name for e in os.scandir(folder) if e.is_dir() and e.name[0] != ".")
        if not classes:
            raise ValueError(
                f"{folder} holds no class folders: expected {folder}/<class>/<image>.jpg"
            )
        indices, names = _imagenet(classes) if all(map(_is_wnid, classes)) else (None, classes)
        files, labels, empty = [], [], []
        for position, name in enumerate(classes):
            images = list_images(folder / name, EXTENSIONS)
            if not images:
                empty.append(name)
            files += [f"{name}/{image}" for image in images]
            labels += [position if indices is None else indices[position]] * len(images)
        if not files:
            raise ValueError(
                f"{folder}: its {len(classes)} class folders hold no images "
                f"({', '.join(EXTENSIONS[:4])}, ...)"
            )
        if empty:
            log.warning("%s: %d classes without images, such as %s", folder, len(empty), empty[0])
        if classnames == "clean" and indices is None:
            names = [name.replace("_", " ") for name in classes]
        elif classnames == "raw" and indices is not None:
            names = list(wnids())
        super().__init__(
            folder,
            files,
            labels,
            names,
            image_size=image_size,
            on_bad_image=on_bad_image,
        )


@cache
def wnids() -> tuple[str, ...]:
    """The 1,000 wnids of ImageNet-1k in the order of its class indices."""
    return tuple(package_files("clipsae.data").joinpath("imagenet_wnids.txt").read_text().split())


def _is_wnid(name: str) -> bool:
    return len(name) == 9 and name[0] == "n" and name[1:].isdigit()


def _imagenet(folders: list[str]) -> tuple[list[int], list[str]]:
    """Class indices of wnids, and all 1,000 names."""
    index = {wnid: i for i, wnid in enumerate(wnids())}
    unknown = [folder for folder in folders if folder not in index]
    if unknown:
        raise ValueError(f"{unknown[0]} is no wnid of ImageNet-1k, while all folders look like one")
    return [index[folder] for folder in folders], list(IMAGENET_CLASSNAMES)

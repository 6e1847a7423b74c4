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
_SPLIT_FOLDERS = {"train": ("train",), "test": ("test", "val", "valid", "validation")}


class ImageFolder(ImageList):
    """`root/<class>/**/*.jpg`, or `root/train/<class>/...` and `root/test` (or `val`).

    A root without split folders serves both splits with the same images: the published protocol
    counts and evaluates on the same ones. So does a root with one split folder, with a warning.
    A folder `train` or `test` that has images in it, but no folders, is a class like others.

    Folders named by ImageNet's wnids are ImageNet's classes: labels are its indices 0..999, and
    names are open_clip's. Otherwise classes are the folders of all splits in sorted order, so
    that a label means the same in each.

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
        inside, classes = _classes(root, split)
        folder = root / inside
        if not classes:
            raise ValueError(
                f"{folder} holds no class folders: expected {folder}/<class>/<image>.jpg"
            )
        indices, names = _labels(classes, classnames, folder)
        files, labels, empty = [], [], []
        for name, label in zip(classes, indices, strict=True):
            images = list_images(folder / name, EXTENSIONS) if (folder / name).is_dir() else []
            if not images:
                empty.append(name)
            files += [(Path(inside) / name / image).as_posix() for image in images]
            labels += [label] * len(images)
        if not files:
            raise ValueError(
                f"{folder}: its {len(classes)} class folders hold no images "
                f"({', '.join(EXTENSIONS[:4])}, ...)"
            )
        if empty:
            log.warning("%s: %d classes without images, such as %s", folder, len(empty), empty[0])
        super().__init__(
            root,
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


def _subfolders(folder: Path) -> set[str]:
    if not folder.is_dir():
        return set()
    return {entry.name for entry in os.scandir(folder) if entry.is_dir() and entry.name[0] != "."}


def _classes(root: Path, split: str) -> tuple[str, list[str]]:
    """The folder within root that a split lies in ("" for root itself), and the class folders of
    all splits in sorted order."""
    found: dict[str, tuple[str, set[str]]] = {}
    for of, names in _SPLIT_FOLDERS.items():
        for name in names:
            # One with images and no folders is a class, or ImageNet's test set without labels.
            if of not in found and (classes := _subfolders(root / name)):
                found[of] = name, classes
    if not found:
        return "", sorted(_subfolders(root))
    if split not in found:
        (name, _), *_ = found.values()
        log.warning("%s has no %s split: %s serves as both", root, split, name)
        found[split] = found.pop(next(iter(found)))
    return found[split][0], sorted(set().union(*(classes for _, classes in found.values())))


def _labels(folders: list[str], classnames: str, root: Path) -> tuple[list[int], list[str]]:
    """The label of each folder, and the names of all classes.

    Raises:
        ValueError: some folders are classes of ImageNet, and others are not.
    """
    index = {wnid: i for i, wnid in enumerate(wnids())}
    unknown = [folder for folder in folders if folder not in index]
    if not unknown:
        names = IMAGENET_CLASSNAMES if classnames == "clean" else wnids()
        return [index[folder] for folder in folders], list(names)
    if classnames == "raw":
        return list(range(len(folders))), folders
    if len(unknown) < len(folders):
        raise ValueError(
            f"{root}: {unknown[0]} is no wnid of ImageNet-1k, while {len(folders) - len(unknown)} "
            f"of the {len(folders)} class folders are: remove it, or choose classnames=raw"
        )
    return list(range(len(folders))), [name.replace("_", " ") for name in folders]

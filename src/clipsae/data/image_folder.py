"""Any folder of class folders as a dataset."""

import hashlib
import logging
from collections import Counter
from collections.abc import Sequence
from functools import cache, cached_property
from importlib.resources import files as package_files
from pathlib import Path
from typing import Literal

import torch
from open_clip import IMAGENET_CLASSNAMES
from torch import Tensor

from clipsae.data.captions import read_captions
from clipsae.data.class_folders import ClassFolders, find_class_folders, words
from clipsae.data.dataset import ImageList, OnBadImage, check_choice
from clipsae.data.listing import LeftOut, files_in, list_images

log = logging.getLogger(__name__)


class ImageFolder(ImageList):
    """`root/<class>/**/*.jpg`, or `root/train/<class>/...` and `root/test/<class>/...`.

    Split folders may be spelled in any case and go by their other usual names (training, Testing,
    val, dev, test_images, ...). Folders that only wrap others are walked through. A root without
    split folders, or with one of them, serves both splits with the same images, with a warning.

    Classes are the folders that hold an image in any split, in sorted order, so that a label means
    the same in each. Where all of them are wnids of ImageNet (`n01440764`), labels are ImageNet's
    indices 0..999, and names are open_clip's.

    Photos are read as a viewer shows them (`read_image`'s `as_seen`).

    Args:
        root: the folder.
        split: "train" or "test".
        image_size: S.
        classnames: "clean": underscores and CamelCase are taken apart, wnids are names; "raw": as
            the folders are spelled.
        classes: which compete where the folders are wnids: "all" 1,000, or those that are
            "present", with labels 0..C-1.
        on_bad_image: see `ImageList`.
        captions: a CSV file with a caption of each image (`captions.read_captions`); None: the
            names of the classes are their captions.

    Attributes:
        one_split: whether both splits are the same images.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: not a folder, no class folders in it, no images in them, an unknown option,
            images without a caption.
    """

    def __init__(
        self,
        root: Path | str,
        split: str = "test",
        *,
        image_size: int = 224,
        classnames: Literal["clean", "raw"] = "clean",
        classes: Literal["all", "present"] = "all",
        on_bad_image: OnBadImage = "error",
        captions: Path | str | None = None,
    ) -> None:
        check_choice("split", split, "train", "test")
        check_choice("classnames", classnames, "clean", "raw")
        check_choice("classes", classes, "all", "present")
        root = Path(root).expanduser()
        if not root.exists():
            raise FileNotFoundError(f"dataset.root={root}: there is no such folder")
        if not root.is_dir():
            raise ValueError(f"dataset.root={root}: expected a folder of class folders, not a file")
        found = find_class_folders(root)
        indices, names = _labels(found.all_classes, classnames, classes, root)
        label = dict(zip(found.all_classes, indices, strict=True))
        left_out = LeftOut()
        files: list[str] = []
        labels: list[int] = []
        for name in found.classes[split]:
            folder = found.splits[split] / name
            images = list_images(folder, left_out)
            place = folder.relative_to(root).as_posix()
            files += [f"{place}/{image}" for image in images]
            labels += [label[name]] * len(images)
        super().__init__(
            root, files, labels, names, image_size=image_size, on_bad_image=on_bad_image
        )
        self.one_split = found.one_split
        self.written = None if captions is None else read_captions(captions, root, self.files)
        _report(root, split, found, self, left_out)

    @cached_property
    def fingerprint(self) -> str:
        """That of the list of files; with captions of their own, of these, too."""
        if self.written is None:
            return super().fingerprint
        digest = hashlib.sha256("\0".join(self.written).encode()).hexdigest()[:16]
        return f"{super().fingerprint}-{digest}"

    def captions(self, indices: Sequence[int] | Tensor) -> list[str]:
        """A caption of each image: that of the file, or the name of its class."""
        if self.written is None:
            return super().captions(indices)
        return [self.written[index] for index in torch.as_tensor(indices).tolist()]


def _report(
    root: Path, split: str, found: ClassFolders, data: ImageList, left_out: LeftOut
) -> None:
    """One line on what is read as the split and what is left out; a warning for each thing that is
    likely not intended."""
    here, train, names = found.classes[split], found.classes["train"], data.classnames
    beside = [f"{folder.relative_to(root).as_posix()}/" for folder in found.beside(split)]
    more = f" and {len(beside) - 4} more folders" * (len(beside) > 4)
    for folder in {found.top, found.splits[split]}:
        for file, reason in files_in(folder, deep=False):
            left_out[reason or "beside the class folders"].append(file)
    log.info(
        "%s split: %s images of %s%s (such as %r) in %s; %s%s",
        split,
        f"{len(data):,}",
        f"{len(here):,} of " if len(here) < len(names) else "",
        "1 class" if len(names) == 1 else f"{len(names):,} classes",
        names[int(data.labels[0])],
        found.splits[split],
        left_out,
        f"; no part of it: {', '.join(beside[:4])}{more}" if beside else "",
    )
    if found.doubt:
        log.warning("%s: %s", root, found.doubt)
    if split != "test":
        return
    if found.one_split:
        log.warning(
            "%s has class folders of one split only: both splits are the same %s images%s, so an "
            "SAE is evaluated on its training images",
            root,
            f"{len(data):,}",
            ""
            if found.splits["test"] == root
            else f" of {found.splits['test'].relative_to(root)}/",
        )
    elif new := sorted({*here} - {*train}):
        log.warning(
            "%s: %d of the %d classes of the test split have no images in the training split, such "
            "as %s",
            *(root, len(new), len(here), new[0]),
        )
    twice = [name for name, count in Counter(map(str.lower, names)).items() if count > 1]
    if twice and found.all_classes[0] not in wnids():  # of ImageNet's names two are the same
        log.warning(
            "%s: %d class names belong to several folders, such as %r: CLIP cannot tell them apart",
            *(root, len(twice), twice[0]),
        )


@cache
def wnids() -> tuple[str, ...]:
    """The 1,000 wnids of ImageNet-1k in the order of its class indices."""
    return tuple(package_files("clipsae.data").joinpath("imagenet_wnids.txt").read_text().split())


def _labels(
    folders: list[str], classnames: str, classes: str, root: Path
) -> tuple[list[int], list[str]]:
    """The label of each folder, and the names of all classes that compete.

    Raises:
        ValueError: some folders are classes of ImageNet, and others are not.
    """
    index = {wnid: i for i, wnid in enumerate(wnids())}
    unknown = [folder for folder in folders if folder not in index]
    labels = list(range(len(folders)))
    if not unknown:
        names = list(IMAGENET_CLASSNAMES if classnames == "clean" else wnids())
        indices = [index[folder] for folder in folders]
        return (indices, names) if classes == "all" else (labels, [names[i] for i in indices])
    if classnames == "raw":
        return labels, folders
    if len(unknown) < len(folders):
        raise ValueError(
            f"{root}: {unknown[0]} is not a wnid of ImageNet-1k, while "
            f"{len(folders) - len(unknown)} of the {len(folders)} class "
            "folders are: remove it, or choose classnames=raw"
        )
    return labels, [words(name) for name in folders]

"""ImageNet-1k (Russakovsky et al., 2015) and ImageNet-Sketch (Wang et al., 2019).

Both are folders of wnids; classes are the 1,000 wnids in order, names are open_clip's (those of
CLIP's authors).

ImageNet: https://image-net.org (non-commercial research, after registration). Layout:
`train/<wnid>/*.JPEG` and `val/<wnid>/*.JPEG`, as torchvision and everybody sorts them; CoOp has
both in `images/`, and the archive of the challenge in `ILSVRC/Data/CLS-LOC/`. Test is `val`.
Kaggle's copy of that archive has `val/*.JPEG` unsorted, and their wnids in `LOC_val_solution.csv`.

ImageNet-Sketch: https://github.com/HaohanWang/ImageNet-Sketch (images from the web; research).
Layout: `<wnid>/*.JPEG` in `images/` (CoOp), in `sketch/` (its archive) or at once. It has one
split, which serves as train and as test.
"""

import logging
from pathlib import Path

from open_clip import IMAGENET_CLASSNAMES

from clipsae.data.eleven.base import DatasetInfo, PublishedDataset
from clipsae.data.eleven.files import images_in, read_lines, unwrapped
from clipsae.data.eleven.splits import Split
from clipsae.data.image_folder import wnids
from clipsae.data.listing import folders_in

log = logging.getLogger(__name__)

FOLDERS = {"train": "train", "test": "val"}
SOLUTION = "LOC_val_solution.csv"


class ImageNet(PublishedDataset):
    """See the module. Some of the classes may be missing: labels stay 0..999."""

    about = DatasetInfo(
        name="imagenet",
        title="ImageNet",
        layout="train/<wnid>/<image>.JPEG and val/<wnid>/<image>.JPEG, there or in images/",
        source="https://image-net.org",
        licence="non-commercial research",
        classes=1_000,
        official=(1_281_167, 50_000),
        prompt="a photo of a {}.",
        zero_shot=68.34,
    )
    other_folders = ("imagenet-1k", "ILSVRC2012", "ILSVRC")

    @classmethod
    def images_of(cls, home: Path) -> Path | None:
        return home if any(_holds(unwrapped(home / name)) for name in FOLDERS.values()) else None

    def official(self, split: str) -> Split:
        folder = unwrapped(self.place.images / FOLDERS[split])
        if not folder.is_dir():
            raise FileNotFoundError(
                f"{folder} is not there: {self.about.title}'s {split} split is expected in it, "
                f"one folder for each of the 1,000 wnids"
            )
        prefix = f"{folder.relative_to(self.place.images).as_posix()}/"
        solution = self.place.file(SOLUTION) if split == "test" else None
        if solution is not None and not _wnids_in(folder):
            return read_solution(solution, prefix)
        return list_wnids(folder, prefix)

    def clean(self, raw: str) -> str:
        return IMAGENET_CLASSNAMES[wnids().index(raw)]


class ImageNetSketch(ImageNet):
    """See the module."""

    about = DatasetInfo(
        name="imagenet_sketch",
        title="ImageNet-Sketch",
        layout="<wnid>/<image>.JPEG, there or in images/ or sketch/",
        source="https://github.com/HaohanWang/ImageNet-Sketch",
        licence="images from the web; research",
        classes=1_000,
        official=(50_889, 50_889),
        prompt="a photo of a {}.",
        zero_shot=48.24,
    )
    other_folders = ("sketch",)

    @classmethod
    def images_of(cls, home: Path) -> Path | None:
        folders = [home / "images", home / "sketch", home]
        return next((f for f in folders if f.is_dir() and _wnids_in(f)), None)

    def official(self, split: str) -> Split:
        if split == "train":
            log.warning(
                "imagenet_sketch has one split: train holds the same images as test, so that "
                "what is counted on train is not held out"
            )
        return list_wnids(self.place.images)


def list_wnids(folder: Path, prefix: str = "") -> Split:
    """The images in folders of wnids, paths prefixed.

    One directory read a class and no `stat` of an image: seconds for 1.28 million on a local disk.

    Raises:
        ValueError: no folders of wnids, or one that is not ImageNet-1k's.
    """
    index = {wnid: label for label, wnid in enumerate(wnids())}
    found = _wnids_in(folder)
    unknown = [name for name in found if name not in index]
    if unknown:
        raise ValueError(f"{folder / unknown[0]}: {unknown[0]} is no wnid of ImageNet-1k")
    if not found:
        flat = (
            ", only images: sort them into one folder a class first, or put Kaggle's "
            f"{SOLUTION} beside" * bool(images_in(folder))
        )
        raise ValueError(f"{folder} holds no folders of wnids such as n01440764{flat}")
    files: list[str] = []
    labels: list[int] = []
    for name in found:
        images = images_in(folder / name)
        files += [f"{prefix}{name}/{image}" for image in images]
        labels += [index[name]] * len(images)
    return Split(files, labels, wnids())


def read_solution(path: Path, prefix: str) -> Split:
    """Kaggle's list of the validation images, whose lines after the first are
    "ILSVRC2012_val_00048981,n03995372 85 1 499 272 ".

    Raises:
        ValueError: not such a list.
    """
    index = {wnid: label for label, wnid in enumerate(wnids())}
    files, labels = [], []
    for line in sorted(read_lines(path)[1:]):
        image, _, boxes = line.partition(",")
        wnid = boxes.split(" ")[0]
        if wnid not in index:
            raise ValueError(f"{path}: the line {line!r} is not '<image>,<wnid> ...': get it anew")
        files.append(f"{prefix}{image}.JPEG")
        labels.append(index[wnid])
    return Split(files, labels, wnids(), source=path)


def _wnids_in(folder: Path) -> list[str]:
    """The folders that are named as wnids are."""
    return [name for name in folders_in(folder) if name[0] == "n" and name[1:].isdigit()]


def _holds(folder: Path) -> bool:
    """Whether a split's images are in a folder: the challenge's archive has others of its name."""
    if not folder.is_dir():
        return False
    inside = (folder / name for name in _wnids_in(folder))
    return bool(images_in(folder)) or any(images_in(wnid) for wnid in inside)

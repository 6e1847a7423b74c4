"""ImageNet-1k (Russakovsky et al., 2015) and ImageNet-Sketch (Wang et al., 2019).

Both are folders of wnids; classes are the 1,000 wnids in order, names are open_clip's (those of
CLIP's authors).

ImageNet: https://image-net.org (non-commercial research, after registration). Layout:
`train/<wnid>/*.JPEG` and `val/<wnid>/*.JPEG`, as torchvision and everybody sorts them; CoOp has
both in `images/`, and the archive of the challenge in `ILSVRC/Data/CLS-LOC/`. Test is `val`.

ImageNet-Sketch: https://github.com/HaohanWang/ImageNet-Sketch (images from the web; research).
Layout: `<wnid>/*.JPEG` in `images/` (CoOp), in `sketch/` (its archive) or at once. It has one
split, which serves as train and as test.
"""

import logging
from pathlib import Path

from open_clip import IMAGENET_CLASSNAMES

from clipsae.data.eleven.about import About
from clipsae.data.eleven.base import PublishedDataset
from clipsae.data.eleven.files import images_in
from clipsae.data.eleven.splits import Listing
from clipsae.data.image_folder import wnids
from clipsae.data.listing import folders_in

log = logging.getLogger(__name__)

FOLDERS = {"train": "train", "test": "val"}


class ImageNet(PublishedDataset):
    """See the module. Some of the classes may be missing: labels stay 0..999."""

    about = About(
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
    other_folders = ("ImageNet", "imagenet-1k", "ILSVRC2012")
    homes = (".", "images", "ILSVRC/Data/CLS-LOC")

    @classmethod
    def images_of(cls, home: Path) -> Path | None:
        return home if any((home / name).is_dir() for name in FOLDERS.values()) else None

    def official(self, split: str) -> Listing:
        folder = self.place.images / FOLDERS[split]
        if not folder.is_dir():
            raise FileNotFoundError(
                f"{folder} is not there: {self.about.title}'s {split} split is expected in it, "
                f"one folder for each of the 1,000 wnids"
            )
        return list_wnids(folder, prefix=f"{FOLDERS[split]}/")

    def clean(self, raw: str) -> str:
        return IMAGENET_CLASSNAMES[wnids().index(raw)]


class ImageNetSketch(ImageNet):
    """See the module."""

    about = About(
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
    other_folders = ("imagenet-sketch", "ImageNet-Sketch")
    homes = (".",)

    @classmethod
    def images_of(cls, home: Path) -> Path | None:
        folders = [home / "images", home / "sketch", home]
        return next((f for f in folders if f.is_dir() and set(folders_in(f)) & set(wnids())), None)

    def official(self, split: str) -> Listing:
        if split == "train":
            log.warning(
                "imagenet_sketch has one split: train holds the same images as test, so that "
                "what is counted on train is not held out"
            )
        return list_wnids(self.place.images)


def list_wnids(folder: Path, prefix: str = "") -> Listing:
    """The images in folders of wnids, paths prefixed.

    One directory read a class and no `stat` of an image: seconds for 1.28 million on a local disk.

    Raises:
        ValueError: no folders of wnids, or one that is not ImageNet-1k's.
    """
    index = {wnid: label for label, wnid in enumerate(wnids())}
    found = [name for name in folders_in(folder) if name[0] == "n" and name[1:].isdigit()]
    unknown = [name for name in found if name not in index]
    if unknown:
        raise ValueError(f"{folder / unknown[0]}: {unknown[0]} is no wnid of ImageNet-1k")
    if not found:
        flat = ", only images: sort them into one folder a class first" * bool(images_in(folder))
        raise ValueError(f"{folder} holds no folders of wnids such as n01440764{flat}")
    if len(found) < len(index):
        log.warning("%s holds %d of ImageNet's 1,000 classes", folder, len(found))
    files: list[str] = []
    labels: list[int] = []
    for name in found:
        images = images_in(folder / name)
        files += [f"{prefix}{name}/{image}" for image in images]
        labels += [index[name]] * len(images)
    return Listing(files, labels, wnids())

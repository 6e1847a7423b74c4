"""What the eleven datasets share: finding the folder, choosing the split, naming the classes."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from clipsae.data.dataset import ImageList, OnBadImage
from clipsae.data.eleven.about import COOP, About
from clipsae.data.eleven.files import missing_files
from clipsae.data.eleven.splits import Listing, read_coop_split

log = logging.getLogger(__name__)

_CHOICES = {
    "split": ("train", "test"),
    "split_source": ("auto", "coop", "official"),
    "classnames": ("clean", "raw"),
    "templates": ("imagenet", "dataset"),
}


@dataclass(frozen=True)
class Place:
    """Where a dataset was found.

    Attributes:
        root: the folder that was looked in.
        home: where in it the layout begins.
        images: the folder that paths of images are relative to.
    """

    root: Path
    home: Path
    images: Path

    def file(self, name: str) -> Path | None:
        """A file at home, in the images, or above home up to the root."""
        above = [folder for folder in self.home.parents if folder.is_relative_to(self.root)]
        found = [f / name for f in (self.home, self.images, *above) if (f / name).is_file()]
        return found[0] if found else None


class PublishedDataset(ImageList):
    """One split of a published dataset, in the layouts that people have on disk.

    A subclass states its facts and layouts, and reads its own annotations in `official`.

    Args:
        root: its folder; where that is `<data>/<name>`, the names that CoOp and torchvision give
            to the folder are looked for in `<data>`, too.
        split: "train" or "test". Images that a split file calls validation are in neither.
        image_size: S.
        split_source: "coop": CoOp's split file, refused where it is not there; "official": the
            dataset's own split; "auto": CoOp's where its file is there, else official. The two are
            one where CoOp has no file of its own (Aircraft, ImageNet, Sketch).
        classnames: "clean": names for prompts; "raw": as the dataset spells them.
        templates: "imagenet": the 80 of OpenAI; "dataset": the one prompt that CoOp wrote for it.
        on_bad_image: see `ImageList`; "skip" also leaves out images that a split file names and
            that are not there.
        download: get it with torchvision, where it is not there and the source still serves it.

    Attributes:
        place: where it was found.
        split_source: "coop" or "official", what was taken.

    Raises:
        FileNotFoundError: not there, or a piece of it.
        ValueError: an unknown option, an annotation that cannot be read.
    """

    about: ClassVar[About]
    # Its folder under the data folder by other names, and where in it the layout may begin.
    other_folders: ClassVar[tuple[str, ...]] = ()
    homes: ClassVar[tuple[str, ...]] = (".",)
    image_folders: ClassVar[tuple[str, ...]] = ("images",)
    # The class of torchvision.datasets that downloads it.
    torchvision_class: ClassVar[str | None] = None

    def __init__(
        self,
        root: Path | str,
        split: str = "test",
        image_size: int = 224,
        split_source: Literal["auto", "coop", "official"] = "auto",
        classnames: Literal["clean", "raw"] = "clean",
        templates: Literal["imagenet", "dataset"] = "imagenet",
        on_bad_image: OnBadImage = "error",
        download: bool = False,
    ) -> None:
        chosen = (split, split_source, classnames, templates)
        for (option, choices), value in zip(_CHOICES.items(), chosen, strict=True):
            if value not in choices:
                raise ValueError(f"{option}={value!r}: expected {' or '.join(choices)}")
        self.place = self._locate(Path(root).expanduser(), download)
        listing = self._listing(split, split_source)
        files, labels = self._present(listing, on_bad_image)
        if not files:
            raise ValueError(f"{self.about.title}: no {split} images in {self.place.images}")
        names = listing.raw
        if classnames == "clean":
            names = listing.clean or [self.clean(name) for name in listing.raw]
        super().__init__(
            self.place.images,
            files,
            labels,
            names,
            templates=(self.about.prompt,) if templates == "dataset" else None,
            image_size=image_size,
            on_bad_image=on_bad_image,
            as_seen=False,
        )
        log.info(
            "%s: %s %s images of %d classes (%s) in %s",
            self.about.name,
            f"{len(files):,}",
            split,
            len(names),
            self.split_name,
            self.place.home,
        )

    @property
    def split_name(self) -> str:
        """The split that was taken, in words."""
        return "CoOp's split" if self.split_source == "coop" else self.about.own_split

    def official(self, split: str) -> Listing:
        """The dataset's own split, read from `self.place`."""
        raise NotImplementedError

    def clean(self, raw: str) -> str:
        """A class name for prompts from the dataset's own spelling."""
        return raw.replace("_", " ")

    def raw_name(self, file: str, name: str) -> str:
        """The dataset's own spelling from an entry of CoOp's file: by default the folder's."""
        return file.split("/")[0]

    @classmethod
    def images_of(cls, home: Path) -> Path | None:
        """The folder that paths are relative to, if the layout begins at `home`."""
        found = [home / name for name in cls.image_folders if (home / name).is_dir()]
        return found[0] if found else None

    @classmethod
    def find(cls, root: Path) -> Place | None:
        """Where the dataset lies; None where it is not there."""
        for folder in cls._roots(root):
            for inside in cls.homes:
                images = cls.images_of(folder / inside)
                if images is not None:
                    return Place(folder, folder / inside, images)
        return None

    @classmethod
    def _roots(cls, root: Path) -> list[Path]:
        others = cls.other_folders if root.name == cls.about.name else ()
        return [root, *(root.parent / name for name in others)]

    def _locate(self, root: Path, download: bool) -> Place:
        found = self.find(root)
        if found is None and download:
            self._download(root)
            found = self.find(root)
        if found is None:
            places = " or ".join(map(str, self._roots(root)))
            fetch = ", or set dataset.download=true" if self.torchvision_class else ""
            raise FileNotFoundError(
                f"{self.about.title} is not in {places}: {self.about.where()}{fetch}; "
                f"CLIPSAE_DATA names the folder of all datasets, dataset.root this one's"
            )
        return found

    def _download(self, root: Path) -> None:
        about = self.about
        if self.torchvision_class is None:
            raise ValueError(
                f"download=true: nobody serves {about.title} for a program; get it from "
                f"{about.source} by hand, into {root}"
            )
        from torchvision import datasets

        log.info("downloading %s into %s (licence: %s)", about.title, root, about.licence)
        root.mkdir(parents=True, exist_ok=True)
        try:
            getattr(datasets, self.torchvision_class)(root, download=True)
        except (OSError, RuntimeError, ImportError) as error:
            raise FileNotFoundError(
                f"{about.title} could not be downloaded ({error}): get it from {about.source} by "
                f"hand, into {root}"
            ) from error

    def _listing(self, split: str, split_source: str) -> Listing:
        name = self.about.split_file
        file = self.place.file(name) if name else None
        self.split_source = "official"
        if split_source == "coop" and name and file is None:
            raise FileNotFoundError(
                f"split_source=coop: there is no {name} in {self.place.home}; get it by {COOP}, or "
                f"take split_source=official"
            )
        if split_source == "official" or file is None:
            try:
                return self.official(split)
            except FileNotFoundError as error:
                if name is None:
                    raise
                raise FileNotFoundError(f"{error}; {name} (see {COOP}) would do as well") from error
        self.split_source = "coop"
        return read_coop_split(file, split, self.raw_name)

    def _present(self, listing: Listing, on_bad_image: str) -> tuple[list[str], list[int]]:
        """Files and labels of the listing, checked to be there."""
        images = self.place.images
        files, labels = list(listing.files), list(listing.labels)
        missing = missing_files(images, files) if listing.source else []
        if not missing:
            return files, labels
        said = (
            f"{listing.source} names {len(missing):,} images that are not there, such as "
            f"{images / missing[0]}"
        )
        if on_bad_image != "skip":
            raise FileNotFoundError(
                f"{said}: extract the images anew, or leave these out with on_bad_image=skip"
            )
        log.warning("%s: they are left out", said)
        gone = set(missing)
        kept = [(f, n) for f, n in zip(files, labels, strict=True) if f not in gone]
        return [file for file, _ in kept], [label for _, label in kept]

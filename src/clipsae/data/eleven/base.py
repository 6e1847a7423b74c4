"""What the eleven datasets share: finding the folder, choosing the split, naming the classes."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from clipsae.data.dataset import ImageList, OnBadImage
from clipsae.data.eleven.files import (
    as_they_lie,
    folders_below,
    missing_files,
    unwrapped,
    unwrapped_path,
)
from clipsae.data.eleven.splits import Split, read_coop_split
from clipsae.data.listing import folders_in

log = logging.getLogger(__name__)

COOP = "DATASETS.md of github.com/KaiyangZhou/CoOp"
_CHOICES = {
    "split": ("train", "test"),
    "split_source": ("auto", "coop", "official"),
    "classnames": ("clean", "raw"),
    "templates": ("imagenet", "dataset"),
}


@dataclass(frozen=True)
class DatasetInfo:
    """Facts of one dataset.

    Attributes:
        name: of `conf/dataset/<name>.yaml`, and of its folder under `paths.data_dir`.
        title: as its authors call it.
        layout: what is expected in its folder, for the sentence that says it is not there.
        source: where to get it.
        licence: in a word.
        classes: published number of classes.
        official: published sizes (train, test) of its own split.
        coop: published sizes (train, test) of CoOp's split; None where that is the official one.
        split_file: CoOp's split; None where that is the official one.
        prompt: CoOp's one hand-written prompt for it.
        zero_shot: top-1 accuracy in percent of OpenAI's ViT-B/16 on CoOp's test split with the 80
            ImageNet templates, as quoted from TPT (Shu et al., 2022, arXiv 2209.07511).
        own_split: what "official" means, for the line that says it.
    """

    name: str
    title: str
    layout: str
    source: str
    licence: str
    classes: int
    official: tuple[int, int]
    prompt: str
    zero_shot: float
    coop: tuple[int, int] | None = None
    split_file: str | None = None
    own_split: str = "official split"

    def where(self) -> str:
        """What is expected and where to get it, as part of a sentence."""
        return f"expected {self.layout}; get it from {self.source} (licence: {self.licence})"

    def sizes(self, split_source: str) -> tuple[int, int]:
        """Published sizes (train, test) of "coop" or "official"."""
        return self.coop if split_source == "coop" and self.coop else self.official


@dataclass(frozen=True)
class Location:
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
        """A file at home, in the images, above home up to the root, or in a folder below home.

        Args:
            name: a name or a path; a folder of it may lie in one of its own name.
        """
        above = [folder for folder in self.images.parents if folder.is_relative_to(self.root)]
        for folder in (self.home, self.images, *above, *folders_below(self.home)):
            path = unwrapped_path(folder, name)
            if path.is_file():
                return path
        return None


class PublishedDataset(ImageList):
    """One split of a published dataset, in the layouts that people have on disk.

    A subclass states its facts and layouts, and reads its own annotations in `official`.

    Args:
        root: its folder, in which the layout may begin some folders down; where that is
            `<data>/<name>`, the names that others give to the folder are looked for in `<data>`.
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
        differences: what is not as it was published, a sentence each: images and classes that are
            not there.

    Raises:
        FileNotFoundError: not there, or a piece of it.
        ValueError: an unknown option, an annotation that cannot be read.
    """

    about: ClassVar[DatasetInfo]
    # Its folder under the data folder by other names; capitals, "-" and "_" do not matter.
    other_folders: ClassVar[tuple[str, ...]] = ()
    in_data_folder: ClassVar[bool] = False
    image_folders: ClassVar[tuple[str, ...]] = ("images",)
    # The published classes as the dataset spells them, where its annotations do not list them.
    published: ClassVar[frozenset[str]] = frozenset()
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
        self.differences: list[str] = []
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
        self._classes_that_differ(listing.raw, labels)
        for difference in self.differences:
            log.warning("%s, %s: %s", self.about.name, split, difference)
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

    def annotation(self, name: str) -> Path:
        """Where one of its own files lies, or where it is expected."""
        return self.place.file(name) or self.place.home / name

    def official(self, split: str) -> Split:
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
        for name in cls.image_folders:
            folder = unwrapped(home / name)
            if folder.is_dir() and (name != "." or cls.holds_images(folder)):
                return folder
        return None

    @classmethod
    def holds_images(cls, folder: Path) -> bool:
        """Whether a folder of any name holds the class folders."""
        return not cls.published.isdisjoint(folders_in(folder))

    @classmethod
    def find(cls, root: Path) -> Location | None:
        """Where the dataset lies; None where it is not there."""
        for folder in cls._roots(root):
            # Of the data folder itself what lies in it directly: the others are other datasets.
            for home in folders_below(folder, depth=0 if folder == root.parent else 3):
                images = cls.images_of(home)
                if images is not None:
                    return Location(folder, home, images)
        return None

    @classmethod
    def _roots(cls, root: Path) -> list[Path]:
        """The root; where that is `<data>/<name>`, other folders of `<data>` whose name is one of
        the dataset's in letters and digits; and `<data>` where torchvision makes it there."""
        found = [root]
        if root.name == cls.about.name and root.parent.is_dir():
            names = {_letters(name) for name in (root.name, *cls.other_folders)}
            found += [root.parent] * cls.in_data_folder
            found += [root.parent / n for n in folders_in(root.parent) if _letters(n) in names]
        return list(dict.fromkeys(found))

    def _locate(self, root: Path, download: bool) -> Location:
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

    def _listing(self, split: str, split_source: str) -> Split:
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

    def _present(self, listing: Split, on_bad_image: str) -> tuple[list[str], list[int]]:
        """Files and labels of the listing, checked to be there."""
        images, labels = self.place.images, list(listing.labels)
        if listing.source is None:
            return list(listing.files), labels
        files = as_they_lie(images, listing.files)
        missing = missing_files(images, files)
        if not missing:
            return files, labels
        example = images / missing[0]
        if len(missing) == len(files):
            raise FileNotFoundError(
                f"none of the {len(files):,} images that {listing.source} names is there, such as "
                f"{example}: expected {self.about.layout}"
            )
        said = (
            f"{listing.source} names {len(missing):,} images that are not there (of "
            f"{len(files):,}), such as {example}"
        )
        if on_bad_image != "skip":
            raise FileNotFoundError(
                f"{said}: extract the images anew, or leave these out with on_bad_image=skip"
            )
        self.differences.append(said)
        gone = set(missing)
        kept = [(f, n) for f, n in zip(files, labels, strict=True) if f not in gone]
        return [file for file, _ in kept], [label for _, label in kept]

    def _classes_that_differ(self, raw: Sequence[str], labels: Sequence[int]) -> None:
        """Note the classes without images, and those that are not the published ones."""
        present = {raw[label] for label in set(labels)}
        classes = sorted(self.published) or list(raw)
        empty = [name for name in classes if name not in present]
        others = [name for name in raw if name not in classes]
        if empty:
            said = f"{len(empty):,} of {len(classes):,} classes without images: {_some(empty)}"
            self.differences.append(said)
        if others:
            self.differences.append(f"classes that are not among the published: {_some(others)}")
        if len(classes) != self.about.classes:
            self.differences.append(
                f"{len(raw):,} classes compete, of the published {self.about.classes:,}"
            )


def _letters(name: str) -> str:
    return "".join(c for c in name.lower() if c.isalnum())


def _some(names: Sequence[str], count: int = 5) -> str:
    more = f" and {len(names) - count:,} more" if len(names) > count else ""
    return ", ".join(names[:count]) + more

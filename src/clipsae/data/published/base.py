"""One published dataset: where its folder is, which split is read, what its classes are called."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import compress
from pathlib import Path
from typing import ClassVar, Literal

from clipsae.data.dataset import ImageList, OnBadImage, check_choice
from clipsae.data.listing import folders_in
from clipsae.data.published.annotations import (
    Split,
    as_on_disk,
    by_rule,
    folders_below,
    read_coop_split,
    unwrapped,
)

log = logging.getLogger(__name__)

COOP = "DATASETS.md of github.com/KaiyangZhou/CoOp"


@dataclass(frozen=True)
class DatasetInfo:
    """Facts of one dataset.

    Attributes:
        name: of `conf/dataset/<name>.yaml`, and of its folder under `paths.data_dir`.
        title: as its authors call it.
        layout: what is expected in its folder, for messages.
        source: where to get it.
        licence: in a word.
        classes: published number of classes.
        official: published sizes (train, test) of its own split.
        prompt: CoOp's hand-written prompt.
        zero_shot: top-1 accuracy in percent of OpenAI's ViT-B/16 on CoOp's test split with the 80
            ImageNet templates, as quoted from TPT (Shu et al., 2022, arXiv 2209.07511).
        coop: published sizes (train, test) of CoOp's split; None where that is the official one.
        split_file: CoOp's split; None where that is the official one.
        own_split: what "official" is called in the log.
        folders: other names of its folder; capitals, "-" and "_" do not matter.
        in_data_folder: whether torchvision unpacks it beside the other datasets.
        images: folders that image paths are relative to, the first that exists; ".": the dataset's
            folder itself, where it holds some of `class_folders`.
        class_folders: the published classes as folders, where no annotation lists them.
        not_classes: folders beside the classes.
        names: prompt names of classes that no rule gives.
        torchvision: the class of torchvision.datasets that downloads it.
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
    folders: tuple[str, ...] = ()
    in_data_folder: bool = False
    images: tuple[str, ...] = ("images",)
    class_folders: frozenset[str] = frozenset()
    not_classes: tuple[str, ...] = ()
    names: Mapping[str, str] = field(default_factory=dict)
    torchvision: str | None = None

    @property
    def free(self) -> bool:
        """Whether its licence lets anyone pass its images on."""
        return self.licence.startswith(("CC", "MIT"))

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
        root: the folder that was searched.
        home: the folder below it in which the layout begins.
        images: the folder that image paths are relative to.
    """

    root: Path
    home: Path
    images: Path

    def file(self, name: str) -> Path | None:
        """A file in `home`, in `images`, between `images` and `root`, or in a folder below `home`.

        Args:
            name: a name or a path.
        """
        inside, _, name = name.rpartition("/")
        above = [folder for folder in self.images.parents if folder.is_relative_to(self.root)]
        for folder in (self.home, self.images, *above, *folders_below(self.home)):
            path = (unwrapped(folder, inside) if inside else folder) / name
            if path.is_file():
                return path
        return None


class PublishedDataset(ImageList):
    """One split of a published dataset, in any of the layouts in which it is distributed.

    A subclass states its facts in `about`, and how its own annotations are read.

    Args:
        root: its folder, in which the layout may begin some folders down. Where that is
            `<data>/<name>`, other usual names of the folder are searched for in `<data>`, too.
        split: "train" or "test". Validation images of a split file are in neither.
        image_size: S.
        split_source: "coop": CoOp's split file; "official": the dataset's own split; "auto": CoOp's
            where its file exists, else official. The two are one for Aircraft, ImageNet and Sketch.
        classnames: "clean": names for prompts; "raw": as the dataset spells them.
        templates: "imagenet": the 80 of OpenAI; "dataset": the one prompt that CoOp wrote for it.
        on_bad_image: see `ImageList`; "skip" also leaves out listed images that do not exist.
        download: get it with torchvision if it is missing and still served.

    Attributes:
        place: where it was found.
        split_source: "coop" or "official", what was read.
        differences: a sentence for each difference from what was published: missing images,
            missing or additional classes.

    Raises:
        FileNotFoundError: the dataset or one of its files does not exist.
        ValueError: an unknown option, an annotation that cannot be read.
    """

    about: ClassVar[DatasetInfo]

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
        check_choice("split", split, "train", "test")
        check_choice("split_source", split_source, "auto", "coop", "official")
        check_choice("classnames", classnames, "clean", "raw")
        check_choice("templates", templates, "imagenet", "dataset")
        self.place = self._locate(Path(root).expanduser(), download)
        self.differences: list[str] = []
        listed = self._read_split(split, split_source)
        files, labels = self._existing(listed, on_bad_image)
        if not files:
            raise ValueError(f"{self.about.title}: no {split} images in {self.place.images}")
        names = listed.raw
        if classnames == "clean":
            names = listed.clean or [self.clean(name) for name in listed.raw]
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
        self.prompt = self.about.prompt
        self._compare_classes(listed.raw, labels)
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
        """The split that was read, in words."""
        return "CoOp's split" if self.split_source == "coop" else self.about.own_split

    # --- what differs between datasets ---

    @classmethod
    def images_of(cls, home: Path) -> Path | None:
        """The folder that image paths are relative to, if the layout begins at `home`."""
        for name in cls.about.images:
            folder = unwrapped(home / name)
            if folder.is_dir() and (name != "." or cls.holds_classes(folder)):
                return folder
        return None

    @classmethod
    def holds_classes(cls, folder: Path) -> bool:
        """Whether a folder of any name holds the class folders."""
        return not cls.about.class_folders.isdisjoint(folders_in(folder))

    def official(self, split: str) -> Split:
        """The dataset's own split; by default a fixed rule over its class folders."""
        return by_rule(self.place.images, split, self.about.not_classes)

    def clean(self, raw: str) -> str:
        """A class name for prompts from the dataset's own spelling."""
        return self.about.names.get(raw, raw).replace("_", " ")

    def raw_name(self, file: str, name: str) -> str:
        """The dataset's own spelling from an entry of CoOp's file: by default the folder's."""
        return file.split("/")[0]

    # --- finding it ---

    def annotation(self, *names: str) -> Path:
        """The first of its files that exists.

        Raises:
            FileNotFoundError: none of them.
        """
        for path in map(self.place.file, names):
            if path is not None:
                return path
        raise FileNotFoundError(f"{self.place.home / names[0]} is missing: {self.about.where()}")

    @classmethod
    def find(cls, root: Path) -> Location | None:
        """Where the dataset lies; None if it does not exist."""
        for folder in cls._roots(root):
            # In the data folder itself only direct content: its folders are other datasets.
            for home in folders_below(folder, depth=0 if folder == root.parent else 3):
                images = cls.images_of(home)
                if images is not None:
                    return Location(folder, home, images)
        return None

    @classmethod
    def _roots(cls, root: Path) -> list[Path]:
        """The folders to search: the root and, where it is `<data>/<name>`, those of `<data>` with
        one of the dataset's names."""
        found = [root]
        if root.name == cls.about.name and root.parent.is_dir():
            names = {_letters(name) for name in (root.name, *cls.about.folders)}
            found += [root.parent] * cls.about.in_data_folder
            found += [root.parent / n for n in folders_in(root.parent) if _letters(n) in names]
        return list(dict.fromkeys(found))

    def _locate(self, root: Path, download: bool) -> Location:
        found = self.find(root)
        if found is None and download:
            self._download(root)
            found = self.find(root)
        if found is None:
            places = " or ".join(map(str, self._roots(root)))
            fetch = ", or set dataset.download=true" if self.about.torchvision else ""
            raise FileNotFoundError(
                f"{self.about.title} is not in {places}: {self.about.where()}{fetch}; "
                f"CLIPSAE_DATA names the folder of all datasets, dataset.root this one's"
            )
        return found

    def _download(self, root: Path) -> None:
        about = self.about
        by_hand = f"get it from {about.source} by hand, into {root}"
        if about.torchvision is None:
            raise ValueError(f"download=true: {about.title} has no direct download; {by_hand}")
        from torchvision import datasets

        log.info("downloading %s into %s (licence: %s)", about.title, root, about.licence)
        root.mkdir(parents=True, exist_ok=True)
        try:
            getattr(datasets, about.torchvision)(root, download=True)
        except (OSError, RuntimeError, ImportError) as error:
            raise FileNotFoundError(
                f"{about.title} could not be downloaded ({error}): {by_hand}"
            ) from error

    # --- reading the split ---

    def _read_split(self, split: str, split_source: str) -> Split:
        name = self.about.split_file
        file = self.place.file(name) if name else None
        if split_source == "coop" and name and file is None:
            raise FileNotFoundError(
                f"split_source=coop: there is no {name} in {self.place.home}; get it by {COOP}, or "
                f"use split_source=official"
            )
        self.split_source = "official" if split_source == "official" or file is None else "coop"
        if file is not None and self.split_source == "coop":
            return read_coop_split(file, split, self.raw_name)
        try:
            return self.official(split)
        except FileNotFoundError as error:
            if name is None:
                raise
            raise FileNotFoundError(f"{error}; {name} (see {COOP}) works instead") from error

    def _existing(self, listed: Split, on_bad_image: str) -> tuple[list[str], list[int]]:
        """Files and labels of the images that exist."""
        images, labels = self.place.images, list(listed.labels)
        if listed.source is None:
            return list(listed.files), labels
        files, exist = as_on_disk(images, listed.files)
        if all(exist):
            return files, labels
        example = images / files[exist.index(False)]
        if not any(exist):
            raise FileNotFoundError(
                f"none of the {len(files):,} images listed in {listed.source} exists, such as "
                f"{example}: expected {self.about.layout}"
            )
        missing = (
            f"{listed.source} lists {exist.count(False):,} images that do not exist (of "
            f"{len(files):,}), such as {example}"
        )
        if on_bad_image != "skip":
            raise FileNotFoundError(
                f"{missing}: extract the images again, or leave these out with on_bad_image=skip"
            )
        self.differences.append(missing)
        return list(compress(files, exist)), list(compress(labels, exist))

    def _compare_classes(self, raw: Sequence[str], labels: Sequence[int]) -> None:
        """Note classes without images, and those that are not the published ones."""
        present = {raw[label] for label in set(labels)}
        classes = sorted(self.about.class_folders) or list(raw)
        empty = [name for name in classes if name not in present]
        others = [name for name in raw if name not in classes]
        if empty:
            count = f"{len(empty):,} of {len(classes):,}"
            self.differences.append(f"{count} classes without images: {_shortened(empty)}")
        if others:
            self.differences.append(f"classes that were not published: {_shortened(others)}")
        if len(classes) != self.about.classes:
            self.differences.append(
                f"{len(raw):,} classes, not the published {self.about.classes:,}"
            )


def _letters(name: str) -> str:
    return "".join(c for c in name.lower() if c.isalnum())


def _shortened(names: Sequence[str], count: int = 5) -> str:
    more = f" and {len(names) - count:,} more" if len(names) > count else ""
    return ", ".join(names[:count]) + more

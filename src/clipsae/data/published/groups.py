"""Datasets whose class is tied to something else in the training images: how well the worst group
of class and confounder is classified says whether a classifier relies on it.

Both are read as Sagawa et al., "Distributionally Robust Neural Networks for Group Shifts" (ICLR
2020, arXiv 1911.08731) use them. N images, A values of the confounder.
"""

import csv
import hashlib
import math
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from clipsae.data.published.annotations import Split, by_class, read_lines, unwrapped
from clipsae.data.published.base import DatasetInfo, PublishedDataset

PARTS = {"train": "0", "test": "2"}  # in the annotations; 1 is for validation


class GroupedDataset(PublishedDataset):
    """A published dataset with groups of images.

    Attributes:
        confounder: the A values of what the class is tied to, in words.
        groups: LongTensor [N], label * A + the image's value of the confounder.
        groupnames: the names of the groups, in that order.
    """

    confounder: ClassVar[tuple[str, ...]]

    def __init__(self, root: Path | str, split: str = "test", **options: Any) -> None:
        super().__init__(root, split, **options)
        values = self.values()
        # By name: the copy on disk may have them in other folders than are listed.
        value = torch.tensor([values[Path(file).name] for file in self.files])
        self.groups: Tensor = self.labels * len(self.confounder) + value
        self.groupnames = [f"{name}, {a}" for name in self.classnames for a in self.confounder]

    @cached_property
    def fingerprint(self) -> str:
        """Of the groups, too."""
        groups = hashlib.sha256(bytes(self.groups.tolist())).hexdigest()[:8]
        return f"{super().fingerprint}-{groups}"

    def values(self) -> dict[str, int]:
        """The confounder's value of each image, by the name of its file."""
        raise NotImplementedError


class Waterbirds(GroupedDataset):
    """Waterbirds: birds of CUB cut out and put before pictures of Places: 95 % of the training
    images have land birds before land and water birds before water, half of the others (Sagawa et
    al.).
    """

    confounder = ("land", "water")
    about = DatasetInfo(
        name="waterbirds",
        title="Waterbirds",
        layout="metadata.csv and <species>/<image>.jpg in waterbird_complete95_forest2water2/",
        source="https://github.com/kohpangwei/group_DRO",
        licence="non-commercial research",
        classes=2,
        official=(4_795, 5_794),
        prompt="a photo of a {}.",
        zero_shot=math.nan,  # of no test split of CoOp's
        folders=("waterbird_complete95_forest2water2",),
        names={"landbird": "landbird", "waterbird": "waterbird"},
    )

    @classmethod
    def images_of(cls, home: Path) -> Path | None:
        return unwrapped(home) if (unwrapped(home) / "metadata.csv").is_file() else None

    def _rows(self) -> list[dict[str, str]]:
        """The lines of `metadata.csv`: img_id, img_filename, y, split, place, place_filename."""
        path = self.annotation("metadata.csv")
        return read_table(path, ("img_filename", "y", "split", "place"))

    def official(self, split: str) -> Split:
        rows = [row for row in self._rows() if row["split"] == PARTS[split]]
        files, labels = [row["img_filename"] for row in rows], [row["y"] for row in rows]
        source = self.annotation("metadata.csv")
        return by_class(files, labels, ["0", "1"], source, raw=list(self.about.names))

    def values(self) -> dict[str, int]:
        return {Path(row["img_filename"]).name: int(row["place"]) for row in self._rows()}


class CelebA(GroupedDataset):
    """CelebA: 202,599 faces of celebrities, aligned (Liu et al., 2015); the class is `Blond_Hair`
    and the confounder `Male`: of the training images with blond hair, 6 % show men.

    Annotations may be the authors' text files or the tables of Kaggle's copy.
    """

    confounder = ("woman", "man")
    about = DatasetInfo(
        name="celeba",
        title="CelebA",
        layout="img_align_celeba/<number>.jpg, list_attr_celeba.txt and list_eval_partition.txt, "
        "or both as .csv",
        source="https://mmlab.ie.cuhk.edu.hk/projects/CelebA.html",
        licence="non-commercial research",
        classes=2,
        official=(162_770, 19_962),
        prompt="a photo of a person with {}.",
        zero_shot=math.nan,
        folders=("CelebFaces",),
        images=("img_align_celeba", "Img/img_align_celeba"),
        names={"not_blond": "dark hair", "blond": "blond hair"},
    )

    @cached_property
    def _attributes(self) -> dict[str, tuple[str, int]]:
        """(class, value of the confounder) of each image by the name of its file."""
        path = self.annotation("list_attr_celeba.txt", "list_attr_celeba.csv")
        wanted = ("Blond_Hair", "Male")
        if path.suffix == ".csv":
            rows = [(r["image_id"], r) for r in read_table(path, ("image_id", *wanted))]
        else:  # how many there are, the attributes' names, and a line for each image
            _, header, *lines = read_lines(path)
            names = header.split()
            if missing := [name for name in wanted if name not in names]:
                raise ValueError(f"{path} has no attribute {missing[0]}: download it again")
            parts = [line.split() for line in lines]
            rows = [(p[0], dict(zip(names, p[1:], strict=False))) for p in parts]
        return {file: (r["Blond_Hair"], int(r["Male"] == "1")) for file, r in rows}

    def official(self, split: str) -> Split:
        path = self.annotation("list_eval_partition.txt", "list_eval_partition.csv")
        if path.suffix == ".csv":
            table = read_table(path, ("image_id", "partition"))
            parts = [(row["image_id"], row["partition"]) for row in table]
        else:
            parts = [(line.split()[0], line.split()[-1]) for line in read_lines(path)]
        files = [file for file, part in parts if part == PARTS[split]]
        if lost := [file for file in files if file not in self._attributes]:
            raise ValueError(f"{path}: {lost[0]} has no attributes: download both files again")
        labels = [self._attributes[file][0] for file in files]
        return by_class(files, labels, ["-1", "1"], path, raw=list(self.about.names))

    def values(self) -> dict[str, int]:
        return {file: value for file, (_, value) in self._attributes.items()}


def read_table(path: Path, columns: Sequence[str]) -> list[dict[str, str]]:
    """The rows of a CSV file.

    Raises:
        ValueError: no rows, or a column that is missing.
    """
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    if not rows:
        raise ValueError(f"{path} is empty: download it again")
    for name in columns:
        if rows[0].get(name) is None:
            raise ValueError(f"{path} has no column {name!r}: download it again")
    return rows


GROUPED = {cls.about.name: cls for cls in (Waterbirds, CelebA)}

"""Stanford Cars: 16,185 photos of 196 models (Krause et al., 2013).

Source: its own page is dead; CoOp's DATASETS.md lists copies (non-commercial research). Layout:
`cars_train/00001.jpg`, `cars_test/`, `devkit/cars_meta.mat`, `devkit/cars_train_annos.mat` and,
in `devkit/` or beside it, `cars_test_annos_withlabels.mat`. In the annotations classes count from 1
and the year ends a name; CoOp puts it first.
"""

from pathlib import Path

from clipsae.data.eleven.base import COOP, DatasetInfo, PublishedDataset
from clipsae.data.eleven.files import read_mat
from clipsae.data.eleven.splits import Split

FILES = {"train": "devkit/cars_train_annos.mat", "test": "cars_test_annos_withlabels.mat"}


class StanfordCars(PublishedDataset):
    """See the module."""

    about = DatasetInfo(
        name="stanford_cars",
        title="Stanford Cars",
        layout="cars_train/, cars_test/, devkit/cars_train_annos.mat, devkit/cars_meta.mat and "
        "cars_test_annos_withlabels.mat, or split_zhou_StanfordCars.json in place of the .mat",
        source=f"the copies listed in {COOP}; its own page is dead",
        licence="non-commercial research",
        classes=196,
        official=(8_144, 8_041),
        coop=(6_509, 8_041),
        split_file="split_zhou_StanfordCars.json",
        prompt="a photo of a {}.",
        zero_shot=66.11,
    )
    other_folders = ("stanford-cars-dataset", "cars")

    @classmethod
    def images_of(cls, home: Path) -> Path | None:
        """CoOp's paths begin with cars_train/ or cars_test/."""
        return home if any((home / f"cars_{split}").is_dir() for split in FILES) else None

    def official(self, split: str) -> Split:
        meta = self.annotation("devkit/cars_meta.mat")
        classes = [str(name) for name in read_mat(meta, "class_names")]
        path = self.annotation(FILES[split])
        annotations = read_mat(path, "annotations")
        try:
            rows = [(str(row["fname"]), int(row["class"])) for row in annotations]
        except (ValueError, IndexError, TypeError) as error:
            raise ValueError(
                f"{path}: its annotations have no 'fname' and 'class' ({error}): get it anew"
            ) from error
        wrong = [number for _, number in rows if not 1 <= number <= len(classes)]
        if wrong:
            raise ValueError(f"{path}: class {wrong[0]} is none of the {len(classes)} of {meta}")
        files = [f"cars_{split}/{file}" for file, _ in rows]
        return Split(files, [number - 1 for _, number in rows], classes, source=path)

    def clean(self, raw: str) -> str:
        """The year first: "Acura RL Sedan 2012" -> "2012 Acura RL Sedan"."""
        model, _, year = raw.rpartition(" ")
        return f"{year} {model}"

    def raw_name(self, file: str, name: str) -> str:
        year, _, model = name.partition(" ")
        return f"{model} {year}"

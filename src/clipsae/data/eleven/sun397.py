"""SUN397: 108,754 photos of 397 kinds of scenes (Xiao et al., 2010).

Source: https://vision.princeton.edu/projects/2010/SUN (research; the images are their owners').
Layout: `SUN397/<letter>/<scene>[/<kind>]/sun_*.jpg`, with `ClassName.txt` and, from
`Partitions.zip`, `Training_01.txt` and `Testing_01.txt`, whose lines are "/a/abbey/sun_....jpg".
The first of the ten partitions is CoOp's, too.
"""

from pathlib import Path

from clipsae.data.eleven.base import DatasetInfo, PublishedDataset
from clipsae.data.eleven.files import read_lines, unwrapped
from clipsae.data.eleven.splits import Split

FILES = {"train": "Training_01.txt", "test": "Testing_01.txt"}


class SUN397(PublishedDataset):
    """See the module. The official split is partition 1: 50 images a class each."""

    about = DatasetInfo(
        name="sun397",
        title="SUN397",
        layout="SUN397/<letter>/<scene>/<image>.jpg, and split_zhou_SUN397.json or the "
        "Training_01.txt and Testing_01.txt of Partitions.zip",
        source="https://vision.princeton.edu/projects/2010/SUN",
        licence="research; the images are their owners'",
        classes=397,
        official=(19_850, 19_850),
        coop=(15_880, 19_850),
        split_file="split_zhou_SUN397.json",
        prompt="a photo of a {}.",
        zero_shot=65.63,
    )
    in_data_folder = True
    torchvision_class = "SUN397"

    @classmethod
    def images_of(cls, home: Path) -> Path | None:
        """The folder of letters: SUN397, or `home` itself where it is that one."""
        for folder in (unwrapped(home / "SUN397"), home):
            if (folder / "a").is_dir():
                return folder
        return None

    def official(self, split: str) -> Split:
        classes = [line.lstrip("/") for line in read_lines(self._annotation("ClassName.txt"))]
        index = {name: label for label, name in enumerate(classes)}
        path = self._annotation(FILES[split])
        files = [line.lstrip("/") for line in read_lines(path)]
        folders = [file.rpartition("/")[0] for file in files]
        unknown = [folder for folder in folders if folder not in index]
        if unknown:
            raise ValueError(f"{path} has the scene {unknown[0]!r}, which ClassName.txt has not")
        raw = [name.partition("/")[2] for name in classes]
        return Split(files, [index[folder] for folder in folders], raw, source=path)

    def _annotation(self, name: str) -> Path:
        found = self.place.file(name) or self.place.file(f"Partitions/{name}")
        if found is None:
            raise FileNotFoundError(
                f"{self.place.home / name} is missing: it comes with Partitions.zip from "
                f"{self.about.source}; extract it there"
            )
        return found

    def clean(self, raw: str) -> str:
        """The words of the path from the last: "church/indoor" -> "indoor church"."""
        return super().clean(" ".join(reversed(raw.split("/"))))

    def raw_name(self, file: str, name: str) -> str:
        """The path without letter and image: "c/church/indoor/sun_x.jpg" -> "church/indoor"."""
        return "/".join(file.split("/")[1:-1])

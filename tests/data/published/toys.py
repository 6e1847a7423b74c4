"""The published datasets at toy size, in the layouts in which they are distributed.

    python tests/data/published/toys.py FOLDER [--layout coop|official] [--only dtd food101]
    CLIPSAE_DATA=FOLDER python run.py task=data

"coop" is CoOp's tree with its split files, "official" what torchvision makes, or the archives as
they are: real JPEG files and annotation formats, a few of the real classes. A class is a colour and
a grain, so that something can be learned from it. What a loader should find is stated by hand.
"""

import argparse
import json
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.io import savemat

LAYOUTS = ("coop", "official")
SIDE = 48  # pixels
Entry = tuple[str, int, str]  # path, label, class name


@dataclass(frozen=True)
class Built:
    """What a loader should find.

    Attributes:
        root: what `root` should be.
        raw, clean: class names in the order of their indices.
        files: split -> paths relative to the folder of images, in order; [] where a rule decides.
        labels: split -> class indices.
        split_source: what `auto` resolves to.
    """

    root: Path
    raw: list[str]
    clean: list[str]
    files: dict[str, list[str]]
    labels: dict[str, list[int]]
    split_source: str


def save_image(path: Path, label: int, mode: str = "RGB") -> None:
    """A JPEG whose colour and grain are the class's, with noise that is the file's."""
    rng = np.random.default_rng(zlib.crc32(path.name.encode()))
    colour = np.array([(label * 89) % 256, (label * 157 + 60) % 256, (label * 211 + 120) % 256])
    y, x = np.mgrid[:SIDE, :SIDE]
    wave = 40 * np.sin((x * np.cos(label) + y * np.sin(label)) * (0.3 + 0.1 * (label % 5)))
    pixels = colour + wave[..., None] + rng.normal(0, 12, (SIDE, SIDE, 3))
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    image.convert(mode).save(path, format="JPEG", quality=90)


def write(path: Path, lines: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")


class Toy:
    """Images of a few classes in three parts, saved; annotations are the builder's.

    Args:
        root: what `root` should be.
        images: the folder of images.
        raw, clean: class names.
        file: (index of the class, number of the image) -> path.
        names: CoOp's class names; None: `raw`.
        counts: images of a class for train, val and test.
    """

    def __init__(
        self,
        root: Path,
        images: Path,
        raw: list[str],
        clean: list[str],
        file: Callable[[int, int], str],
        names: list[str] | None = None,
        counts: tuple[int, int, int] = (4, 2, 3),
    ) -> None:
        self.root, self.raw, self.clean, self.counts = root, raw, clean, counts
        self.train: list[Entry] = []
        self.val: list[Entry] = []
        self.test: list[Entry] = []
        for label, name in enumerate(names or raw):
            entries = [(file(label, n), label, name) for n in range(1, sum(counts) + 1)]
            train, val = counts[0], counts[0] + counts[1]
            self.train += entries[:train]
            self.val += entries[train:val]
            self.test += entries[val:]
            for path, *_ in entries:
                save_image(images / path, label)

    def built(self, train: list[Entry], test: list[Entry], source: str) -> Built:
        parts = {"train": train, "test": test}
        files = {split: [file for file, *_ in entries] for split, entries in parts.items()}
        labels = {split: [label for _, label, _ in entries] for split, entries in parts.items()}
        return Built(self.root, self.raw, self.clean, files, labels, source)

    def coop(self, path: Path) -> Built:
        """With CoOp's file."""
        path.write_text(json.dumps({"train": self.train, "val": self.val, "test": self.test}))
        return self.built(self.train, self.test, "coop")

    def official(self) -> Built:
        """With annotations that have no validation images."""
        return self.built(self.train + self.val, self.test, "official")

    def by_rule(self) -> Built:
        """Of a split by rule only the sizes are stated: of ten images a class five and three."""
        built = self.built(self.train, self.test, "official")
        return Built(**{**vars(built), "files": {"train": [], "test": []}})


def caltech101(data: Path, layout: str) -> Built:
    raw = ["Faces", "Leopards", "airplanes", "ceiling_fan"]
    root = data / "caltech101"
    home = data / "caltech-101" if layout == "coop" else root
    images = home / "101_ObjectCategories"
    toy = Toy(
        *(root, images, raw, ["face", "leopard", "airplane", "ceiling fan"]),
        lambda c, n: f"{raw[c]}/image_{n:04d}.jpg",
        ["face", "leopard", "airplane", "ceiling_fan"],
        (5, 2, 3),
    )
    for other in ("BACKGROUND_Google", "Faces_easy"):
        save_image(images / other / "image_0001.jpg", 9)
    save_image(images / "Faces" / "image_0002.jpg", 0, mode="L")  # some are grey
    return toy.coop(home / "split_zhou_Caltech101.json") if layout == "coop" else toy.by_rule()


def dtd(data: Path, layout: str) -> Built:
    raw = ["banded", "knitted", "polka-dotted"]
    root = data / "dtd"
    home = root if layout == "coop" else root / "dtd"
    toy = Toy(root, home / "images", raw, raw, lambda c, n: f"{raw[c]}/{raw[c]}_{n:04d}.jpg")
    for part in ("train", "val", "test"):
        write(home / "labels" / f"{part}1.txt", [file for file, *_ in getattr(toy, part)])
    if layout == "coop":
        toy.test, toy.train = toy.train, toy.test  # another split than DTD's
        return toy.coop(home / "split_zhou_DescribableTextures.json")
    return toy.built(toy.train, toy.test, "official")


def eurosat(data: Path, layout: str) -> Built:
    raw = ["AnnualCrop", "Highway", "SeaLake"]
    clean = ["Annual Crop Land", "Highway or Road", "Sea or Lake"]
    root = data / "eurosat"
    home = root if layout == "coop" else root / "eurosat"
    name = lambda c, n: f"{raw[c]}/{raw[c]}_{n}.jpg"  # noqa: E731
    toy = Toy(root, home / "2750", raw, clean, name, clean, (5, 2, 3))
    return toy.coop(home / "split_zhou_EuroSAT.json") if layout == "coop" else toy.by_rule()


def fgvc_aircraft(data: Path, layout: str) -> Built:
    variants = ["707-320", "F/A-18", "Cessna 172", "Boeing 717"]
    root = data / "fgvc_aircraft"
    home = root if layout == "coop" else data / "fgvc-aircraft-2013b" / "data"
    toy = Toy(root, home / "images", variants, variants, lambda c, n: f"{c}{n:06d}.jpg")
    write(home / "variants.txt", variants)
    for part in ("train", "val", "test"):
        lines = [f"{Path(file).stem} {name}" for file, _, name in getattr(toy, part)]
        write(home / f"images_variant_{part}.txt", lines)
    return toy.built(toy.train, toy.test, "official")


def food101(data: Path, layout: str) -> Built:
    raw = ["apple_pie", "bibimbap", "french_fries"]
    clean = ["apple pie", "bibimbap", "french fries"]
    home = data / "food-101"
    name = lambda c, n: f"{raw[c]}/{1000 + n}.jpg"  # noqa: E731
    toy = Toy(data / "food101", home / "images", raw, clean, name)
    (home / "meta").mkdir()
    official = {"train": toy.train + toy.val, "test": toy.test}
    for split, entries in official.items():
        # The archive's files name the classes in no order.
        content = {c: [f[:-4] for f, _, name in entries if name == c] for c in reversed(raw)}
        (home / "meta" / f"{split}.json").write_text(json.dumps(content))
    if layout == "coop":
        return toy.coop(home / "split_zhou_Food101.json")
    return toy.built(sorted(official["train"], key=lambda entry: entry[1]), toy.test, "official")


WNIDS = {
    "n01440764": (0, "tench"),
    "n02099601": (207, "Golden Retriever"),
    "n03495258": (594, "harp"),
    "n04355933": (836, "sunglasses"),
    "n04356056": (837, "sunglasses"),
}


def imagenet(data: Path, layout: str) -> Built:
    root = data / "imagenet"
    home = root / "images" if layout == "coop" else root
    files: dict[str, list[str]] = {"train": [], "test": []}
    labels: dict[str, list[int]] = {"train": [], "test": []}
    for wnid, (label, _) in WNIDS.items():
        train = [f"train/{wnid}/{wnid}_{10 + n}.JPEG" for n in range(16)]
        test = [f"val/{wnid}/ILSVRC2012_val_{label * 10 + n:08d}.JPEG" for n in range(2)]
        for split, paths in (("train", train), ("test", test)):
            for n, path in enumerate(paths):
                grey = (wnid, n) == ("n01440764", 0)  # a few are CMYK
                save_image(home / path, label, "CMYK" if grey else "RGB")
            files[split] += paths
            labels[split] += [label] * len(paths)
    return Built(root, [], [], files, labels, "official")


def imagenet_sketch(data: Path, layout: str) -> Built:
    root = data / "imagenet_sketch"
    home = data / "imagenet-sketch" / "images" if layout == "coop" else root / "sketch"
    files = [f"{wnid}/sketch_{n}.JPEG" for wnid in WNIDS for n in range(3)]
    labels = [label for label, _ in WNIDS.values() for _ in range(3)]
    for file, label in zip(files, labels, strict=True):
        save_image(home / file, label, "L")
    both = ("train", "test")
    return Built(root, [], [], dict.fromkeys(both, files), dict.fromkeys(both, labels), "official")


def oxford_pets(data: Path, layout: str) -> Built:
    raw = ["Abyssinian", "american_bulldog", "Bengal"]
    root = data / "oxford_pets"
    home = root if layout == "coop" else data / "oxford-iiit-pet"
    toy = Toy(
        *(root, home / "images", raw, ["abyssinian", "american bulldog", "bengal"]),
        lambda c, n: f"{raw[c]}_{n * 13}.jpg",
        [name.lower() for name in raw],
    )
    trainval = sorted(toy.train + toy.val)
    for name, entries in (("trainval", trainval), ("test", toy.test)):
        lines = [f"{Path(file).stem} {label + 1} 1 1" for file, label, _ in entries]
        write(home / "annotations" / f"{name}.txt", lines)
    if layout == "coop":
        return toy.coop(home / "split_zhou_OxfordPets.json")
    return toy.built(trainval, toy.test, "official")


def stanford_cars(data: Path, layout: str) -> Built:
    raw = ["AM General Hummer SUV 2000", "Acura RL Sedan 2012", "Ram C/V Cargo Van Minivan 2012"]
    clean = ["2000 AM General Hummer SUV", "2012 Acura RL Sedan", "2012 Ram C/V Cargo Van Minivan"]
    root = data / "stanford_cars"

    def file(label: int, n: int) -> str:
        return f"cars_train/{label}{n:04d}.jpg" if n <= 6 else f"cars_test/{label}{n - 6:04d}.jpg"

    def annotations(path: str, entries: list[Entry]) -> None:
        """The struct array of the devkit: a box, the class from 1, and the file's name."""
        fields = ["bbox_x1", "bbox_y1", "bbox_x2", "bbox_y2", "class", "fname"]
        rows = np.zeros((1, len(entries)), dtype=[(name, object) for name in fields])
        for i, (image, label, _) in enumerate(entries):
            rows[0, i] = (5, 5, 40, 40, label + 1, image.split("/")[1])
        savemat(root / path, {"annotations": rows})

    toy = Toy(root, root, raw, clean, file, clean)
    (root / "devkit").mkdir()
    names = np.empty((1, len(raw)), dtype=object)
    names[0] = raw
    savemat(root / "devkit" / "cars_meta.mat", {"class_names": names})
    train = sorted(toy.train + toy.val)
    annotations("devkit/cars_train_annos.mat", train)
    annotations("cars_test_annos_withlabels.mat", toy.test)
    if layout == "coop":
        return toy.coop(root / "split_zhou_StanfordCars.json")
    return toy.built(train, toy.test, "official")


def sun397(data: Path, layout: str) -> Built:
    folders = ["a/abbey", "a/airport_terminal", "c/church/indoor", "c/church/outdoor"]
    root = data / "sun397"
    home = root if layout == "coop" else data
    toy = Toy(
        *(root, home / "SUN397", ["abbey", "airport_terminal", "church/indoor", "church/outdoor"]),
        ["abbey", "airport terminal", "indoor church", "outdoor church"],
        lambda c, n: f"{folders[c]}/sun_{zlib.crc32(folders[c].encode())}{n}.jpg",
        ["abbey", "airport_terminal", "indoor church", "outdoor church"],
    )
    write(home / "SUN397" / "ClassName.txt", [f"/{folder}" for folder in folders])
    if layout == "coop":
        return toy.coop(home / "split_zhou_SUN397.json")
    for name, entries in (("Training", toy.train + toy.val), ("Testing", toy.test)):
        write(home / "Partitions" / f"{name}_01.txt", [f"/{file}" for file, *_ in entries])
    return toy.official()


def ucf101(data: Path, layout: str) -> Built:
    raw = ["ApplyEyeMakeup", "HandstandPushups", "YoYo"]
    folders = ["Apply_Eye_Makeup", "Handstand_Pushups", "Yo_Yo"]
    videos = ["ApplyEyeMakeup", "HandStandPushups", "YoYo"]  # so in the archive
    root = data / "ucf101"
    toy = Toy(
        *(root, root / "UCF-101-midframes", raw, [name.replace("_", " ") for name in folders]),
        lambda c, n: f"{folders[c]}/v_{videos[c]}_g{n:02d}_c01.jpg",
        folders,
    )
    if layout == "coop":
        return toy.coop(root / "split_zhou_UCF101.json")
    lists = root / "ucfTrainTestlist"
    write(lists / "classInd.txt", [f"{i} {name}" for i, name in enumerate(raw, start=1)])
    for split, entries in (("train", toy.train + toy.val), ("test", toy.test)):
        lines = [
            f"{raw[label]}/{Path(file).stem}.avi" + f" {label + 1}" * (split == "train")
            for file, label, _ in entries
        ]
        write(lists / f"{split}list01.txt", lines)
    return toy.official()


BUILDERS: dict[str, Callable[[Path, str], Built]] = {
    builder.__name__: builder
    for builder in (
        *(caltech101, dtd, eurosat, fgvc_aircraft, food101, imagenet, imagenet_sketch),
        *(oxford_pets, stanford_cars, sun397, ucf101),
    )
}


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the published datasets at toy size.")
    parser.add_argument("folder", type=Path, help="the data folder; what CLIPSAE_DATA should be")
    parser.add_argument("--layout", choices=LAYOUTS, default="coop")
    parser.add_argument("--only", nargs="+", choices=sorted(BUILDERS), default=sorted(BUILDERS))
    options = parser.parse_args()
    for name in options.only:
        built = BUILDERS[name](options.folder, options.layout)
        counts = ", ".join(f"{len(labels)} {split}" for split, labels in built.labels.items())
        print(f"{name}: {counts}")


if __name__ == "__main__":
    main()

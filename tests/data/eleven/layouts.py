"""The pieces that toy datasets are made of: images, split files, annotations."""

import json
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.io import savemat

SIDE = 48  # pixels


@dataclass(frozen=True)
class Built:
    """What a loader should find, split by split.

    Attributes:
        root: what `root` should be.
        raw, clean: class names in the order of their indices.
        files: split -> paths relative to the folder of images, in order.
        labels: split -> class indices.
        split_source: what `auto` comes to.
    """

    root: Path
    raw: list[str]
    clean: list[str]
    files: dict[str, list[str]]
    labels: dict[str, list[int]]
    split_source: str


Entry = tuple[str, int, str]  # path, label, class name


def save_image(path: Path, label: int, mode: str = "RGB") -> None:
    """A JPEG whose colour and grain are the class's, with noise that is the file's own."""
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


def coop_file(path: Path, train: list[Entry], val: list[Entry], test: list[Entry]) -> None:
    path.write_text(json.dumps({"train": train, "val": val, "test": test}))


def from_parts(
    root: Path, raw: list[str], clean: list[str], source: str, parts: dict[str, list[Entry]]
) -> Built:
    return Built(
        root,
        raw,
        clean,
        {split: [entry[0] for entry in parts[split]] for split in ("train", "test")},
        {split: [entry[1] for entry in parts[split]] for split in ("train", "test")},
        source,
    )


def parts_of(
    folders: list[str], names: list[str], file: Callable[[str, int], str], counts=(4, 2, 3)
) -> dict[str, list[Entry]]:
    """Entries of each part: of every class `counts` images for train, val and test."""
    parts: dict[str, list[Entry]] = {"train": [], "val": [], "test": []}
    for label, (folder, name) in enumerate(zip(folders, names, strict=True)):
        number = 1
        for part, count in zip(parts, counts, strict=True):
            for _ in range(count):
                parts[part].append((file(folder, number), label, name))
                number += 1
    return parts


def save_parts(images: Path, parts: dict[str, list[Entry]]) -> None:
    for entries in parts.values():
        for file, label, _ in entries:
            save_image(images / file, label)


def by_rule(root: Path, folders: list[str], clean: list[str]) -> Built:
    """Of a split by rule only the sizes are stated: of ten images a class five and three."""
    counts = {"train": 5, "test": 3}
    return Built(
        root,
        folders,
        clean,
        {split: [] for split in counts},
        {s: [label for label in range(len(folders)) for _ in range(n)] for s, n in counts.items()},
        "official",
    )


def save_cars(path: Path, entries: list[Entry]) -> None:
    """The struct array of the devkit: a box, the class from 1, and the file's name."""
    fields = ["bbox_x1", "bbox_y1", "bbox_x2", "bbox_y2", "class", "fname"]
    rows = np.zeros((1, len(entries)), dtype=[(name, object) for name in fields])
    for i, (file, label, _) in enumerate(entries):
        rows[0, i] = (5, 5, 40, 40, label + 1, file.split("/")[1])
    savemat(path, {"annotations": rows})

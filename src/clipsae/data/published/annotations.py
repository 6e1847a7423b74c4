"""Reads the annotations of published datasets; a file that is missing or broken is named."""

import hashlib
import json
import os
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clipsae.data.listing import folders_in

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")


@dataclass(frozen=True)
class Split:
    """One split.

    Attributes:
        files: N paths relative to the folder of images.
        labels: N class indices.
        raw: C class names as the dataset spells them.
        clean: C names for prompts; None: `PublishedDataset.clean` of `raw`.
        source: the file that lists the images; None: the images were found in their folders.
    """

    files: Sequence[str]
    labels: Sequence[int]
    raw: Sequence[str]
    clean: Sequence[str] | None = None
    source: Path | None = None


def by_class(
    files: Sequence[str],
    classes: Sequence[Hashable],
    index: Sequence[Hashable],
    source: Path | None = None,
    *,
    index_file: Path | str = "",
    raw: Sequence[str] | None = None,
) -> Split:
    """A split from the class of each file.

    Args:
        files: N paths.
        classes: N entries of `index`.
        index: C classes in the order of their labels.
        source: see `Split`.
        index_file: where `index` was read from.
        raw: C class names; None: those of `index`.

    Raises:
        ValueError: a class that is not in `index`.
    """
    labels = {name: label for label, name in enumerate(index)}
    for name in classes:
        if name not in labels:
            where = f" of {index_file}" if index_file else ""
            raise ValueError(f"{source}: {name!r} is not one of the {len(labels):,} classes{where}")
    return Split(
        files, [labels[name] for name in classes], raw or list(map(str, index)), None, source
    )


def by_rule(folder: Path, split: str, left_out: Sequence[str] = ()) -> Split:
    """A split of class folders that have none: half of each class for training, 3/10 for test.

    Proportions and rounding are CoOp's, so the sizes are the published ones; its validation images,
    2/10, are in neither split. Images are ordered by the SHA-256 of "<class>/<file>".

    Raises:
        ValueError: no class folders.
    """
    inside = {name: images_in(folder / name) for name in folders_in(folder) if name not in left_out}
    index = [name for name, images in inside.items() if images]
    if not index:
        raise ValueError(f"{folder} holds no class folders: expected {folder}/<class>/<image>.jpg")
    files: list[str] = []
    for name in index:
        images = [f"{name}/{image}" for image in inside[name]]
        images.sort(key=lambda file: hashlib.sha256(file.encode(errors="surrogateescape")).digest())
        train, val = round(len(images) * 0.5), round(len(images) * 0.2)
        files += sorted(images[:train] if split == "train" else images[train + val :])
    return by_class(files, [file.split("/")[0] for file in files], index)


def read_coop_split(path: Path, split: str, raw_name: Callable[[str, str], str]) -> Split:
    """One split of CoOp's `split_zhou_*.json`: lists "train", "val" and "test" of [path, label,
    class name].

    Args:
        path: the file.
        split: "train" or "test".
        raw_name: (path of an image, CoOp's class name) -> the dataset's own spelling.

    Raises:
        ValueError: another content, a label without a name or with two.
    """
    content = read_json(path)
    names: dict[int, str] = {}
    raw: dict[int, str] = {}
    chosen: list[tuple[str, int]] = []
    for part in ("train", "val", "test"):
        if not isinstance(content, dict) or not isinstance(content.get(part), list):
            raise ValueError(f"{path} has no list {part!r}: expected CoOp's train, val and test")
        for entry in content[part]:
            try:
                file, label, name = entry[0], int(entry[1]), entry[2]
                clean = name.replace("_", " ")
                raw.setdefault(label, raw_name(file, name))
            except (TypeError, ValueError, IndexError, KeyError, AttributeError) as error:
                raise ValueError(
                    f"{path}: {entry!r} is not [image path, label, class name]"
                ) from error
            if names.setdefault(label, clean) != clean:
                raise ValueError(f"{path}: label {label} is both {names[label]!r} and {clean!r}")
            if part == split:
                chosen.append((file, label))
    order = sorted(names)
    if not chosen or order != list(range(len(order))):
        raise ValueError(f"{path}: expected labels 0, 1, ... without gaps and images in {split!r}")
    return Split(
        files=[file for file, _ in chosen],
        labels=[label for _, label in chosen],
        raw=[raw[label] for label in order],
        clean=[names[label] for label in order],
        source=path,
    )


def read_lines(path: Path) -> list[str]:
    """The lines of a text file that are not blank, stripped.

    Raises:
        ValueError: not text, or empty.
    """
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not text ({error.reason}): download it again") from error
    if not any(lines):
        raise ValueError(f"{path} is empty: download it again")
    return [line for line in lines if line]


def read_fields(path: Path, fields: str) -> list[list[str]]:
    """The lines of a text file as fields; the last one takes the rest of its line.

    Args:
        fields: their names, for example "image class"; a line with fewer raises ValueError.
    """
    count = len(fields.split())
    rows = [line.split(maxsplit=count - 1) for line in read_lines(path)]
    for row in rows:
        if len(row) < count:
            raise ValueError(f"{path}: the line {' '.join(row)!r} is not '{fields}'")
    return rows


def read_json(path: Path) -> Any:
    """A JSON file; ValueError where it is none."""
    try:
        return json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is not readable JSON ({error}): download it again") from error


def read_mat(path: Path, key: str) -> list[Any]:
    """The elements of one array of a MATLAB file: structs with named fields, or strings.

    Raises:
        ValueError: not a MATLAB file, no such array in it, or SciPy is not installed.
    """
    try:
        from scipy.io import loadmat
    except ImportError as error:
        raise ValueError(f"{path} is read with SciPy: pip install scipy") from error
    try:
        return list(loadmat(path, squeeze_me=True)[key].reshape(-1))
    except Exception as error:  # loadmat raises nearly anything on a broken file
        raise ValueError(
            f"{path} is not a MATLAB file with {key!r} ({error}): download it again"
        ) from error


# --- folders ---


def names_in(folder: Path) -> list[str]:
    """Names of the entries of a folder; [] where there is none."""
    try:
        return os.listdir(folder)  # noqa: PTH208 - a Path an entry would be slow
    except OSError:
        return []


def images_in(folder: Path) -> list[str]:
    """Names of the images directly in a folder, sorted."""
    return sorted(n for n in names_in(folder) if n[0] != "." and n.lower().endswith(EXTENSIONS))


def unwrapped(folder: Path, path: str = "") -> Path:
    """A folder, or with `path` one below it. Archives that hold a folder are often unpacked into
    one of that name: of `images/images` it is the inner one, at every level of `path`."""
    for name in path.split("/") if path else [""]:
        folder = folder / name
        while (folder / folder.name).is_dir():
            folder = folder / folder.name
    return folder


def folders_below(root: Path, depth: int = 3) -> Iterator[Path]:
    """The folder and those below it, the nearest first. More than 20 in one folder are classes,
    which are not entered."""
    level = [root]
    for _ in range(depth + 1):
        yield from level
        inside = []
        for folder in level:
            names = folders_in(folder) if folder.is_dir() else []
            inside += [folder / name for name in names[: 20 * (len(names) <= 20)]]
        level = inside


def as_on_disk(folder: Path, files: Sequence[str]) -> tuple[list[str], list[bool]]:
    """Paths of files below a folder with each of their folders `unwrapped`, and whether they exist.
    Each directory is read once."""
    seen: dict[str, tuple[str, set[str]]] = {}
    paths, exist = [], []
    for file in files:
        inside, _, name = file.rpartition("/")
        if inside not in seen:
            place = unwrapped(folder, inside) if inside else folder
            prefix = f"{place.relative_to(folder).as_posix()}/" if inside else ""
            seen[inside] = prefix, set(names_in(place))
        prefix, names = seen[inside]
        paths.append(prefix + name)
        exist.append(name in names)
    return paths, exist

"""Reading annotations: what is not there or cannot be read is named in one sentence."""

import json
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from clipsae.data.listing import folders_in

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")


def read_text(path: Path) -> str:
    """A text file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not text.
    """
    try:
        return path.read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError) as error:
        raise FileNotFoundError(
            f"{path} is missing: it comes with the dataset's annotations; extract them there"
        ) from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not text ({error.reason}): get it anew") from error


def read_lines(path: Path) -> list[str]:
    """The lines of a text file that are not blank, stripped.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not text, or nothing in it.
    """
    lines = [line.strip() for line in read_text(path).splitlines() if line.strip()]
    if not lines:
        raise ValueError(f"{path} is empty: get it anew")
    return lines


def read_fields(path: Path, fields: str) -> list[list[str]]:
    """The lines of a text file as fields; the last one takes the rest of its line.

    Args:
        fields: their names, for example "image class"; a line of fewer is refused.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not text, nothing in it, a line with fewer fields.
    """
    count = len(fields.split())
    rows = [line.split(maxsplit=count - 1) for line in read_lines(path)]
    for row in rows:
        if len(row) < count:
            raise ValueError(f"{path}: the line {' '.join(row)!r} is not '{fields}'")
    return rows


def read_json(path: Path) -> Any:
    """A JSON file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not JSON.
    """
    try:
        return json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not readable JSON ({error}): get it anew") from error


def read_mat(path: Path, key: str) -> list[Any]:
    """The elements of one array of a MATLAB file: structs with named fields, or strings.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a MATLAB file, no such array in it, or SciPy is not installed.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is missing: it comes with the dataset's annotations; put it there"
        )
    try:
        from scipy.io import loadmat
    except ImportError as error:
        raise ValueError(f"{path} is read with SciPy: pip install scipy") from error
    try:
        content = loadmat(path, squeeze_me=True)
    except Exception as error:  # a broken file raises nearly anything
        raise ValueError(f"{path} is not a readable MATLAB file ({error}): get it anew") from error
    if key not in content:
        raise ValueError(f"{path} holds no {key!r}: get it anew")
    return list(content[key].reshape(-1))


def names_in(folder: Path) -> list[str]:
    """Names of what lies directly in a folder; one directory read, no `stat`."""
    with os.scandir(folder) as entries:
        return [entry.name for entry in entries]


def images_in(folder: Path) -> list[str]:
    """Names of the images directly in a folder, sorted."""
    return sorted(n for n in names_in(folder) if n[0] != "." and n.lower().endswith(EXTENSIONS))


def unwrapped(folder: Path) -> Path:
    """The folder, or the one of its own name in it: archives that hold a folder are often unpacked
    into one of that name, `images/images`."""
    while (folder / folder.name).is_dir():
        folder = folder / folder.name
    return folder


def unwrapped_path(folder: Path, path: str) -> Path:
    """A path below a folder, of whose folders each is `unwrapped`."""
    *folders, name = path.split("/")
    for inside in folders:
        folder = unwrapped(folder / inside)
    return folder / name


def folders_below(root: Path, depth: int = 3) -> Iterator[Path]:
    """The folder itself and those in it, the nearest first, but for what lies in classes: in
    folders that are more than 20."""
    level = [root]
    for _ in range(depth + 1):
        yield from level
        inside = []
        for folder in level:
            names = folders_in(folder) if folder.is_dir() else []
            inside += [folder / name for name in names[: 20 * (len(names) <= 20)]]
        level = inside


def as_they_lie(folder: Path, files: Iterable[str]) -> list[str]:
    """Paths of files below a folder, each of their folders `unwrapped`."""
    places: dict[str, str] = {}
    found = []
    for file in files:
        inside, _, name = file.rpartition("/")
        if inside not in places:
            place = unwrapped_path(folder, f"{inside}/" if inside else "").relative_to(folder)
            places[inside] = f"{place.as_posix()}/" if inside else ""
        found.append(places[inside] + name)
    return found


def missing_files(folder: Path, files: Iterable[str]) -> list[str]:
    """Those of `files` (relative paths) that are not in `folder`, by one read per directory."""
    wanted: dict[str, list[str]] = defaultdict(list)
    for file in files:
        wanted[file.rpartition("/")[0]].append(file)
    missing = []
    for inside, members in wanted.items():
        try:
            present = set(names_in(folder / inside))
        except OSError:
            present = set()
        missing += [file for file in members if file.rpartition("/")[2] not in present]
    return missing

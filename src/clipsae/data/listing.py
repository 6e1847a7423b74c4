"""Which files below a folder are images: by their endings, by content where an ending says
nothing, so that a million files are listed without being opened."""

import os
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from PIL import Image

# Pillow's picture formats: those with a signature in their first bytes, then the others. What is
# left are documents, icons, films, arrays.
_SIGNED = (
    *("JPEG", "MPO", "PNG", "WEBP", "GIF", "TIFF", "BMP", "PPM", "AVIF", "HEIF", "JPEG2000"),
    *("QOI", "PSD"),
)
_FORMATS = (*_SIGNED, "DIB", "TGA", "PCX", "SGI", "DDS", "SUN", "XBM", "XPM")
# Files of these endings are not opened to see whether they are images: what comes with images, and
# the copies that editors and downloads leave.
_NO_IMAGES = frozenset(
    ".txt .md .rst .csv .tsv .json .jsonl .xml .yaml .yml .html .htm .log .ini .cfg .toml .py .sh "  # noqa: SIM905
    ".ipynb .npy .npz .mat .pkl .pt .pth .safetensors .h5 .hdf5 .parquet .arrow .db .sqlite .zip "
    ".tar .gz .tgz .bz2 .xz .7z .rar .pdf .doc .docx .xls .xlsx .ppt .pptx .mp4 .avi .mov .mkv "
    ".webm .mp3 .wav .md5 .sha256 .lnk .url .bak .orig .old .tmp .part .crdownload".split()
)
# Folders that systems, not people, make.
_OF_SYSTEMS = (
    *("@eadir", "@recycle", "#recycle", "#snapshot", "~snapshot", "$recycle.bin", "lost+found"),
    *("system volume information", "__pycache__"),
)
_SHOWN = 6  # reasons that a line lists


class LeftOut(defaultdict[str, list[str]]):
    """Files that were not taken, by reason."""

    def __init__(self) -> None:
        super().__init__(list)

    def __str__(self) -> str:
        total = sum(map(len, self.values()))
        if not total:
            return "no file left out"
        parts = [
            f"{len(files):,} {reason} (such as {files[0]})"
            for reason, files in sorted(self.items(), key=lambda item: -len(item[1]))
        ]
        more = f", {len(parts) - _SHOWN} more kinds" * (len(parts) > _SHOWN)
        files = "file" if total == 1 else "files"
        return f"left out {total:,} {files}: {', '.join(parts[:_SHOWN])}{more}"


def list_images(folder: Path, left_out: LeftOut | None = None) -> list[str]:
    """Paths of the images anywhere below a folder, relative to it, sorted.

    Hidden files (`._a.jpg`, which a Mac leaves beside `a.jpg`), those in the folders of a system
    (`@eaDir`, `__MACOSX`) and what Pillow cannot read are left out, and added to `left_out`.
    """
    found = []
    for file, reason in files_in(folder):
        if not reason:
            found.append(file)
        elif left_out is not None:
            left_out[reason].append(f"{folder.name}/{file}")
    return sorted(found)


def has_images(folder: Path, *, directly: bool = False) -> bool:
    """Whether an image lies anywhere below a folder, or `directly` in it; it stops at the first."""
    return any(not reason for _, reason in files_in(folder, deep=not directly))


def folders_in(folder: Path) -> list[str]:
    """Names of the folders directly in a folder, sorted, without hidden ones and a system's."""
    with os.scandir(folder) as entries:
        return sorted(e.name for e in entries if e.is_dir() and not is_of_system(e.name))


def is_of_system(name: str) -> bool:
    """Whether a folder is hidden, or one that systems make rather than people."""
    return name[0] == "." or name.lower() in _OF_SYSTEMS or name.startswith("__MACOSX")


@cache
def endings() -> frozenset[str]:
    """Endings of image files that this Pillow reads, lower-case with the dot."""
    known = Image.registered_extensions()  # loads the plugins
    readable = {*Image.OPEN, "MPO"}.intersection(_FORMATS)  # MPO is opened as a JPEG
    return frozenset(ending for ending, name in known.items() if name in readable)


def files_in(folder: Path, inside: str = "", *, deep: bool = True) -> Iterator[tuple[str, str]]:
    """Files below a folder, or directly in it, as relative paths, each with why it is no image to
    be taken; "" for one that is."""
    folders = []
    try:
        with os.scandir(folder / inside) as entries:
            for entry in entries:
                relative = f"{inside}/{entry.name}" if inside else entry.name
                if not entry.is_dir():
                    yield relative, _why_not(entry)
                elif deep and not is_of_system(entry.name) and not _leads_up(entry):
                    folders.append(relative)
    except PermissionError:
        yield inside or str(folder), "in folders that may not be read"
    for relative in folders:
        yield from files_in(folder, relative)


def _why_not(entry: os.DirEntry[str]) -> str:
    """Why a file is no image, as the end of "5 ..."; "" where it is one."""
    stem, dot, ending = entry.name.rpartition(".")
    ending = (dot + ending).lower() if stem else ""
    if entry.name[0] == ".":
        return "hidden"
    if ending in endings():
        return ""
    if ending in _NO_IMAGES or ending.endswith("~"):
        return ending
    if _is_image(entry.path):
        return ""
    return f"{ending} that Pillow cannot read" if ending else "without an ending, no images"


def _is_image(path: str) -> bool:
    """Whether a file's first bytes are those of an image."""
    Image.init()
    try:
        with Image.open(path, formats=[name for name in _SIGNED if name in Image.OPEN]):
            return True
    except Exception:  # Pillow raises anything on other files
        return False


def _leads_up(entry: os.DirEntry[str]) -> bool:
    """Whether a folder is a link to one that it lies in."""
    return entry.is_symlink() and Path(entry.path).parent.resolve().is_relative_to(
        Path(entry.path).resolve()
    )

"""Files that are whole: flushed to disk, sealed by checksums, set aside when damaged."""

import errno
import hashlib
import json
import logging
import os
from collections.abc import Iterator, Mapping
from itertools import count
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)

MARK = "meta.json"  # written last: a folder without it is not finished
FULL = ("No space left on device", "Disk quota exceeded")
NEARLY_NOTHING = 1 << 20  # bytes


def write_json(path: Path, content: Any) -> None:
    """Write JSON whole or not at all."""
    write_text(path, json.dumps(content, indent=2, sort_keys=True) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a text file, UTF-8, whole or not at all: aside, flushed, renamed."""
    aside = path.with_name(f".{path.name}.tmp")
    aside.write_text(text, encoding="utf-8")
    fsync(aside)
    aside.replace(path)


def read_json(path: Path) -> dict[str, Any]:
    """A mapping written by `write_json`; empty where it is missing or cannot be read."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def fsync(path: Path) -> None:
    """Flush a file or a folder's entries to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path: Path) -> str:
    """The SHA-256 of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def files_below(folder: Path) -> Iterator[tuple[str, Path]]:
    """Relative names and paths of all files below a folder, sorted by name."""
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            yield path.relative_to(folder).as_posix(), path


# --- a finished folder and its seal ---


def seal(folder: Path, about: Mapping[str, Any]) -> None:
    """Write the mark of a finished folder: `about`, each file's size and SHA-256, and the mark's
    own SHA-256. Everything is on disk when it returns."""
    files = {
        name: {"bytes": path.stat().st_size, "sha256": sha256(path)}
        for name, path in files_below(folder)
        if name != MARK
    }
    meta = {**about, "files": files}
    write_json(folder / MARK, {**meta, "seal": _seal(meta)})
    for path in (*folder.rglob("*"), folder):
        fsync(path)


def find_damage(folder: Path, *, content: bool = True) -> str | None:
    """What is wrong with a finished folder, in a few words; None where all is as it was sealed.

    Args:
        folder: the finished folder.
        content: compare checksums, too (a second for a gigabyte or two); otherwise sizes alone.
    """
    try:
        meta = json.loads((folder / MARK).read_text())
        found = meta.pop("seal")
        files = {name: (f["bytes"], f["sha256"]) for name, f in meta["files"].items()}
    except FileNotFoundError:
        return f"has no {MARK}"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{MARK} cannot be read, or is without checksums"
    if found != _seal(meta):
        return f"{MARK} does not match its checksum"
    for name, (size, checksum) in files.items():
        path = folder / name
        try:
            if (there := path.stat().st_size) != size:
                return f"{name} has {there} of {size} bytes"
            if content and sha256(path) != checksum:
                return f"{name} does not match its checksum"
        except FileNotFoundError:
            return f"{name} is missing"
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
    return None


def _seal(meta: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(meta, sort_keys=True).encode()).hexdigest()


def set_aside(path: Path) -> Path:
    """Rename a damaged file or folder to `.<name>.damaged-<n>` beside it, and say where it is.

    Raises:
        FileNotFoundError: it is gone.
    """
    places = (path.with_name(f".{path.name}.damaged-{n}") for n in count(1))
    return path.rename(next(place for place in places if not place.exists()))


# --- a checkpoint and its checksum ---


def put_checkpoint(aside: Path, path: Path, step: int) -> None:
    """Replace the checkpoint `path` by `aside`, its checksum beside it in `<name>.json`.

    Two files cannot be replaced at once: the checksums of the new and of the last ones are
    written first, so that the one that a kill leaves is known to be whole.

    Args:
        aside: the new checkpoint, written and closed, in the same folder.
        path: its place.
        step: optimizer steps that it holds, for `task=status`.
    """
    fsync(aside)
    saved = [{"sha256": sha256(aside), "step": step}, *_saved(path)[:3]]
    write_json(_note(path), {"saved": saved})
    aside.replace(path)
    fsync(path.parent)


def whole_checkpoint(path: Path) -> Path | None:
    """`path` if a checkpoint is there and matches its checksum. A damaged one is named in a
    warning and set aside, and counts as none."""
    try:
        checksum = sha256(path)
    except FileNotFoundError:
        return None
    except OSError as error:
        checksum = f"unreadable ({error.strerror})"
    if any(saved["sha256"] == checksum for saved in _saved(path)):
        return path
    try:
        aside = set_aside(path)
    except FileNotFoundError:  # another rank was faster
        return None
    log.warning("%s does not match its checksum: set aside as %s, not used", path, aside.name)
    return None


def checkpoint_step(folder: Path) -> int | None:
    """Steps of the newest checkpoint noted in a folder; None where there is none."""
    paths = [note.with_suffix("") for note in folder.glob("*.json")]
    steps = [_saved(path)[0]["step"] for path in paths if path.exists() and _saved(path)]
    return max(steps, default=None)


def _note(path: Path) -> Path:
    return path.with_name(f"{path.name}.json")


def _saved(path: Path) -> list[dict[str, Any]]:
    """Checksums and steps of a checkpoint and the ones before it, the newest first."""
    return read_json(_note(path)).get("saved", [])


# --- a full disk ---


def disk_is_full(error: BaseException, folder: Path) -> bool:
    """Whether an error, or one behind it, says that the disk or a quota is full.

    Libraries turn ENOSPC into errors of their own, some without the word: a disk without a
    mebibyte left is taken as the reason of any failed write, too.
    """
    seen: BaseException | None = error
    while seen is not None:
        if any(words in str(seen) for words in FULL):
            return True
        seen = seen.__cause__ or seen.__context__
    vague = isinstance(error, RuntimeError) or (
        isinstance(error, OSError) and error.errno in (None, errno.EIO)
    )
    return vague and free_bytes(folder) < NEARLY_NOTHING


def free_bytes(folder: Path) -> int:
    """Bytes that can be written where `folder` is, or is going to be."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    found = os.statvfs(folder)
    return found.f_bavail * found.f_frsize

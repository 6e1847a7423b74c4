"""Finished work, found again by what produced it.

A stage (a trained SAE, an evaluation) lives in a folder named by readable words and a hash of
everything that determines its content:

    <root>/sae/sparsemax-clipsae-tiny-scenes-m2048-s0-1a2b3c4d5e/

The folder appears whole or not at all. While it is being made it lies beside its place as
`.<name>.partial`, where a killed run finds its checkpoint; `meta.json`, written last, marks it as
finished; one rename puts it in its place.
"""

import hashlib
import json
import os
import platform
import shutil
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

SCHEMA = 1  # raise it when the same config would no longer give the same content
MARK = "meta.json"
SCRATCH = "scratch"  # what only an unfinished stage needs


def digest(key: Mapping[str, Any]) -> str:
    """Ten hex digits of the SHA-256 of a JSON-like mapping, whatever the order of its keys.

    Raises:
        TypeError: a value that JSON cannot hold.
    """
    text = json.dumps({"schema": SCHEMA, **key}, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:10]


@dataclass(frozen=True)
class Stage:
    """A piece of work with a place in the store.

    Attributes:
        path: the folder of the finished work.
        key: what determines its content.
    """

    path: Path
    key: Mapping[str, Any]

    @property
    def work(self) -> Path:
        """The folder while the work is being made."""
        return self.path.with_name(f".{self.path.name}.partial")

    @property
    def scratch(self) -> Path:
        """A folder inside `work` for checkpoints; gone when the work is finished."""
        return self.work / SCRATCH

    @property
    def finished(self) -> bool:
        return (self.path / MARK).is_file()

    def make(self, build: Callable[[Path], None]) -> Path:
        """Return the finished folder, making it first where it is missing.

        Args:
            build: writes the content into the folder that it is given. It may find there what an
                earlier, interrupted call left in `scratch`.
        """
        if self.finished:
            return self.path
        self.scratch.mkdir(parents=True, exist_ok=True)
        started = time.time()
        build(self.work)
        write_json(
            self.work / MARK,
            {
                "schema": SCHEMA,
                "key": dict(self.key),
                "started": started,
                "finished": time.time(),
                **provenance(),
            },
        )
        for file in self.work.iterdir():
            if file.is_file():
                fsync(file)
        self.work.rename(self.path)
        fsync(self.path.parent)
        shutil.rmtree(self.path / SCRATCH, ignore_errors=True)
        return self.path


class Store:
    """The folder that holds all finished work.

    Args:
        root: created when something is first written.
    """

    def __init__(self, root: Path | str) -> None:
        self.root = Path(root)

    def stage(self, kind: str, words: list[str], key: Mapping[str, Any]) -> Stage:
        """The place of one piece of work.

        Args:
            kind: "sae", "evaluation", ...: the folder it lies in.
            words: what a person wants to read in the name.
            key: what determines the content: plain JSON values, no paths, no devices.
        """
        slug = "-".join(word.lower().replace("/", "_").replace(" ", "_") for word in words)
        return Stage(self.root / kind / f"{slug}-{digest(key)}", key)

    def finished(self, kind: str) -> list[Path]:
        """All finished folders of a kind, sorted by name."""
        return sorted(mark.parent for mark in (self.root / kind).glob(f"[!.]*/{MARK}"))


def write_json(path: Path, content: Any) -> None:
    """Write JSON whole or not at all: aside, flushed, renamed."""
    aside = path.with_name(f".{path.name}.tmp")
    aside.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
    fsync(aside)
    aside.replace(path)


def fsync(path: Path) -> None:
    """Flush a file or a folder's entries to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def provenance() -> dict[str, Any]:
    """Where a result comes from: versions, git commit (with `-dirty`), host, Python."""
    packages = ("clipsae", "torch", "lightning", "open_clip_torch", "torchmetrics", "hydra-core")
    return {
        "versions": {name: version(name) for name in packages},
        "python": platform.python_version(),
        "git_commit": git_commit(),
        "host": platform.node(),
    }


def git_commit() -> str | None:
    """The commit of the working tree that the package lies in; None outside of one."""
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None

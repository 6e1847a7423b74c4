"""What lies in a store: finished, being made, left, failed, damaged."""

import re
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from clipsae.store import files, lease
from clipsae.store.files import MARK, find_damage, read_json
from clipsae.store.lease import Owner
from clipsae.store.stage import ABOUT, DEAD_AFTER, FAILED

State = Literal["done", "running", "stalled", "failed", "damaged", "left over"]

_NAME = r"[^./][^/]*-[0-9a-f]{10}"
_FINISHED = re.compile(_NAME)
_PARTIAL = re.compile(rf"\.({_NAME})\.partial")
_ASIDE = re.compile(rf"\.({_NAME})\.(?:damaged-\d+|gone-\w+|partial\.\S+)")


@dataclass(frozen=True)
class Entry:
    """One folder of the store.

    Its state: done · running · stalled: nobody works on it, the next to need it continues ·
    failed · damaged · left over: of a process killed while it tidied up.
    """

    kind: str  # "sae", "evaluation", ...
    name: str  # the stage's
    path: Path  # of unfinished work the folder that belongs to its owner
    state: State
    about: Mapping[str, Any] = field(default_factory=dict)  # model, dataset, k, seed
    key: Mapping[str, Any] = field(default_factory=dict)  # what determines its content
    schema: int | None = None  # of the key; None where it is not known
    host: str | None = None  # where it was or is made
    when: str | None = None  # local time on that host: finished, failed or started
    owner: Owner | None = None  # who makes it, or made it last
    step: int | None = None  # of its newest checkpoint
    why: str | None = None  # of a failure or damage

    @property
    def place(self) -> Path:
        """The folder of the finished work."""
        return next(p for p in self.path.parents if p.name == self.kind) / self.name


def survey(root: Path, dead_after: float = DEAD_AFTER) -> list[Entry]:
    """Everything in a store, by kind and name; reads small files only, writes nothing lasting.

    An owner on another machine is shown as stalled when its last sign of life is `dead_after`
    seconds older than a file written now: for the eye. Before anything is taken or removed it is
    judged as `lease.py` says.
    """
    stale = _file_system_time(root) - dead_after
    found = []
    for kind in sorted(path for path in root.glob("[!.]*") if path.is_dir()):
        for path in sorted(kind.iterdir()):
            if match := _PARTIAL.fullmatch(path.name):
                found.append(_unfinished(kind.name, match[1], path, stale))
            elif match := _ASIDE.fullmatch(path.name):
                if ".damaged-" in path.name:
                    wrong = find_damage(path, content=False) or "does not match its checksums"
                    found.append(_sealed(kind.name, match[1], path, wrong))
                else:
                    why = "never begun, or half removed"
                    found.append(Entry(kind.name, match[1], path, "left over", why=why))
            elif _FINISHED.fullmatch(path.name) and (path / MARK).is_file():
                found.append(_sealed(kind.name, path.name, path, find_damage(path, content=False)))
    return found


def size(path: Path) -> int:
    """Bytes of all files below a folder."""
    return sum(file.stat().st_size for _, file in files.files_below(path))


def short(value: str) -> str:
    """A setting's value with the names of stages, and hashes, cut to what distinguishes them."""
    if _FINISHED.fullmatch(value):
        return f"…{value[-10:]}"
    return re.sub(r"[0-9a-f]{16,}", lambda found: found[0][:8], value)


def _sealed(kind: str, name: str, path: Path, wrong: str | None) -> Entry:
    meta = read_json(path / MARK)
    when = meta.get("finished")
    return Entry(
        kind,
        name,
        path,
        "damaged" if wrong else "done",
        meta.get("about", {}),
        meta.get("key", {}),
        meta.get("schema"),
        host=meta.get("host"),
        when=time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(when)) if when else None,
        why=wrong,
    )


def _unfinished(kind: str, name: str, partial: Path, stale: float) -> Entry:
    folder = lease.find(partial)
    if folder is None:
        return Entry(kind, name, partial, "left over", why="an empty folder")
    stage, failed = read_json(folder / ABOUT), read_json(folder / FAILED)
    owner, why = lease.owner_of(folder), None
    host, when = (owner.host, owner.since) if owner else (None, None)
    try:
        late = (folder / lease.LEASE).stat().st_mtime < stale
    except OSError:
        late = False
    state: State = "stalled"
    if not lease.surely_dead(folder) and (lease.lives_here(folder.name) or not late):
        state = "running"
    elif (partial.parent / name / MARK).is_file():
        state, why = "left over", "finished; its maker was killed while it tidied up"
    elif failed:
        state, why = "failed", f"{failed['type']}: {failed['message']}"
        host, when = failed["host"], failed["time"]
    step = files.checkpoint_step(folder / "scratch")
    about, key = stage.get("about", {}), stage.get("key", {})
    return Entry(kind, name, folder, state, about, key, None, host, when, owner, step, why)


def _file_system_time(root: Path) -> float:
    """Now by the clock that stamps the files; this machine's where nothing can be written."""
    try:
        with tempfile.NamedTemporaryFile(dir=root, prefix=".clock-") as probe:
            return Path(probe.name).stat().st_mtime
    except OSError:
        return time.time()

"""`task=gc`: what nothing needs any more in the store, listed or removed."""

import contextlib
import logging
import secrets
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from rich.markup import escape
from rich.table import Table

from clipsae.store import MARK, SCHEMA, find_damage, lease
from clipsae.store.lease import Watch
from clipsae.store.stage import DEAD_AFTER
from clipsae.store.survey import Entry, size, survey
from clipsae.tasks.table import terminal

log = logging.getLogger(__name__)

EXISTS = ("done", "running", "stalled", "failed")


@dataclass(frozen=True)
class Waste:
    """A folder that may go, why, and how many bytes it holds."""

    entry: Entry
    reason: str
    bytes: int


def run(cfg: DictConfig) -> None:
    """List, and with `task.delete` remove."""
    root = Path(cfg.paths.output_dir)
    found = list(waste(survey(root), unused=cfg.task.unused))
    console = terminal(140)
    if not found:
        console.print(f"nothing to remove in {root}", soft_wrap=True)
        return
    console.print(table(found, root))
    total = sum(one.bytes for one in found)
    if not cfg.task.delete:
        console.print(f"{megabytes(total)} in all; task.delete=true removes them")
        return
    removed = remove([one.entry for one in found], root)
    freed = sum(one.bytes for one in found if one.entry in removed)
    console.print(f"removed {megabytes(freed)} of {megabytes(total)}")


def waste(entries: list[Entry], *, unused: bool) -> Iterator[Waste]:
    """What may go of a store.

    Args:
        entries: all that is in it.
        unused: finished SAEs, too, that nothing refers to.
    """
    there = {e.name for e in entries if e.kind == "sae" and e.state in EXISTS}
    used = set().union(*(saes_of(e) for e in entries if e.state in EXISTS)) if unused else None
    written = [cache_of(e) for e in entries if e.state == "running"]
    for entry in entries:
        reason = _reason(entry, there, used)
        if reason is None and entry.kind == "shards" and _left(entry, written):
            reason = "a shard of a cache that nobody works on"
        if reason:
            yield Waste(entry, reason, size(entry.path))


def saes_of(entry: Entry) -> set[str]:
    """The SAEs that a stage was made from: `sae` or `saes` of its key."""
    key = entry.key
    return {key["sae"]} if "sae" in key and entry.kind != "sae" else set(key.get("saes", ()))


def cache_of(entry: Entry) -> dict[str, Any]:
    """The key of the feature cache that a shard belongs to, or of any other stage its own."""
    return {k: v for k, v in entry.key.items() if k not in ("shard", "shard_images")}


def _left(shard: Entry, written: list[dict[str, Any]]) -> bool:
    """Whether nobody writes the other shards of its cache. (From one shard to the next nobody
    seems to, for a moment: a new one is not left.)"""
    if shard.state != "done" or cache_of(shard) in written:
        return False
    return time.time() - (shard.path / MARK).stat().st_mtime > DEAD_AFTER


def _reason(entry: Entry, there: set[str], used: set[str] | None) -> str | None:
    if entry.state == "running":
        return None
    if entry.state in ("stalled", "failed"):
        at = "no checkpoint" if entry.step is None else f"a checkpoint at step {entry.step:,}"
        return f"unfinished, {at}, nobody works on it"
    if entry.state != "done":
        return f"{entry.state}: {entry.why}"
    if entry.schema != SCHEMA:
        return f"superseded: of schema {entry.schema}, now {SCHEMA}"
    if gone := saes_of(entry) - there:
        return f"its SAE {min(gone)} is gone"
    if used is not None and entry.kind == "sae" and entry.name not in used:
        return "an SAE that nothing refers to"
    return None


def remove(entries: list[Entry], root: Path, dead_after: float = DEAD_AFTER) -> list[Entry]:
    """Remove folders, except those that a living process holds; say which are removed.

    Unfinished work of other machines is watched for `dead_after` seconds first, all at once, as
    whoever would take it over does.
    """
    watch = Watch(dead_after)
    leases = {entry.path: _lease(entry.path, root / entry.kind) for entry in entries}
    waiting = {folder for folder in leases.values() if folder is not None}
    alive = set()
    while waiting:
        judged = {folder: watch.alive(folder) for folder in waiting}
        alive |= {folder for folder, lives in judged.items() if lives}
        waiting = {folder for folder, lives in judged.items() if lives is None}
        if waiting:
            log.info("watching %d unfinished stages of other machines", len(waiting))
            time.sleep(min(10, dead_after / 4))
    removed = []
    for entry in entries:
        if leases[entry.path] in alive:
            log.warning("%s has come to life: left alone", entry.name)
        elif _remove(entry, root / entry.kind):
            removed.append(entry)
        else:
            log.warning("%s could not be removed", entry.path)
    return removed


def _lease(path: Path, kind: Path) -> Path | None:
    """The lease whose owner's life decides whether a folder may go."""
    return path if path.parent != kind else lease.find(path)


def _remove(entry: Entry, kind: Path) -> bool:
    """Whether it is gone. It leaves its place by one rename, so that it is never seen half gone,
    and which fails where another has taken it over in this moment."""
    path, partial = entry.path, kind / f".{entry.name}.partial"
    try:
        if path == partial:  # without a lease; one that another begins now makes this fail
            path.rmdir()
            return True
        if path.name == entry.name and entry.state == "damaged" and not find_damage(path):
            return False  # recomputed meanwhile
        gone = path.rename(kind / f".{entry.name}.gone-{secrets.token_hex(4)}")
        with contextlib.suppress(OSError):
            partial.rmdir()
    except OSError:
        return False
    shutil.rmtree(gone, ignore_errors=True)
    return not gone.exists()


def table(found: list[Waste], root: Path) -> Table:
    """One row a folder."""
    shown = Table(title=f"What nothing needs in {root}", title_justify="left")
    shown.add_column("kind")
    shown.add_column("stage", overflow="fold")
    shown.add_column("why", overflow="fold")
    shown.add_column("size", justify="right")
    for one in found:
        shown.add_row(one.entry.kind, one.entry.name, escape(one.reason), megabytes(one.bytes))
    return shown


def megabytes(count: int) -> str:
    return f"{count / 1e6:,.1f} MB"

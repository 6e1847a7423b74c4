"""`task=gc`: what nothing needs any more in the store, listed or removed."""

import contextlib
import logging
import secrets
import shutil
import time
from collections.abc import Sequence
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


def run(cfg: DictConfig) -> None:
    """List, and with `task.delete` remove."""
    root = Path(cfg.paths.output_dir)
    found = waste(survey(root), unused=cfg.task.unused)
    console = terminal(140)
    if not found:
        console.print(f"nothing to remove in {root}", soft_wrap=True)
        return
    sizes = {entry.path: size(entry.path) for entry, _ in found}
    table = Table(title=f"What nothing needs in {root}", title_justify="left")
    table.add_column("kind")
    table.add_column("stage", overflow="fold")
    table.add_column("why", overflow="fold")
    table.add_column("size", justify="right")
    for entry, why in found:
        table.add_row(entry.kind, entry.name, escape(why), megabytes(sizes[entry.path]))
    console.print(table)
    total = megabytes(sum(sizes.values()))
    if not cfg.task.delete:
        console.print(f"{total} in all; task.delete=true removes them")
        return
    removed = remove([entry for entry, _ in found])
    console.print(f"removed {megabytes(sum(sizes[entry.path] for entry in removed))} of {total}")


def megabytes(count: int) -> str:
    return f"{count / 1e6:,.1f} MB"


def waste(entries: Sequence[Entry], *, unused: bool) -> list[tuple[Entry, str]]:
    """What may go of a store, and why.

    Args:
        entries: all that is in it.
        unused: finished SAEs, too, that nothing refers to.
    """
    existing = [entry for entry in entries if entry.state in EXISTS]
    saes = {entry.name for entry in existing if entry.kind == "sae"}
    used = set().union(*map(_saes_of, existing)) if unused else saes
    written = [_cache_of(entry) for entry in entries if entry.state == "running"]
    reasons = ((entry, _reason(entry, saes, used, written)) for entry in entries)
    return [(entry, why) for entry, why in reasons if why]


def _reason(
    entry: Entry, saes: set[str], used: set[str], written: Sequence[dict[str, Any]]
) -> str | None:
    """Why an entry may go; None: it may not.

    Args:
        saes: those that there are, by name.
        used: those that are needed.
        written: keys of the stages that are being made.
    """
    if entry.state == "running":
        return None
    if entry.state in ("stalled", "failed"):
        at = "no checkpoint" if entry.step is None else f"a checkpoint at step {entry.step:,}"
        return f"unfinished, {at}, nobody works on it"
    if entry.state != "done":
        return f"{entry.state}: {entry.why}"
    if entry.schema != SCHEMA:
        return f"superseded: of schema {entry.schema}, now {SCHEMA}"
    if gone := _saes_of(entry) - saes:
        return f"its SAE {min(gone)} is gone"
    if entry.kind == "sae" and entry.name not in used:
        return "an SAE that nothing refers to"
    is_left = entry.kind == "shards" and _cache_of(entry) not in written
    # From one shard of a cache to the next nobody works on it, for a moment.
    if is_left and time.time() - (entry.path / MARK).stat().st_mtime > DEAD_AFTER:
        return "a shard of a cache that nobody works on"
    return None


def _saes_of(entry: Entry) -> set[str]:
    """The SAEs that a stage was made from: `sae` or `saes` of its key."""
    key = entry.key
    return {key["sae"]} if "sae" in key and entry.kind != "sae" else set(key.get("saes", ()))


def _cache_of(entry: Entry) -> dict[str, Any]:
    """The key of the feature cache that a shard belongs to, or of any other stage its own."""
    return {k: v for k, v in entry.key.items() if k not in ("shard", "shard_images")}


def remove(entries: Sequence[Entry], dead_after: float = DEAD_AFTER) -> list[Entry]:
    """Remove folders, except those that a living process holds; say which are removed.

    Unfinished work of other machines is watched for `dead_after` seconds first, all at once, as
    whoever would take it over does.
    """
    watch = Watch(dead_after)
    leases = {
        e.path: lease.find(e.path) if e.path.parent == e.place.parent else e.path for e in entries
    }
    alive = dict.fromkeys(filter(None, leases.values()))
    while waiting := [folder for folder, lives in alive.items() if lives is None]:
        alive |= {folder: watch.alive(folder) for folder in waiting}
        if None in alive.values():
            log.info("watching unfinished stages of other machines")
            time.sleep(min(10, dead_after / 4))
    removed = []
    for entry in entries:
        folder = leases[entry.path]
        if folder is not None and alive[folder]:
            log.warning("%s is in use again: kept", entry.name)
        elif _remove(entry):
            removed.append(entry)
        else:
            log.warning("%s could not be removed", entry.path)
    return removed


def _remove(entry: Entry) -> bool:
    """Whether it is gone. It leaves its place by one rename, so that it is never seen half gone,
    and which fails where another has taken it over in this moment."""
    path, partial = entry.path, entry.place.with_name(f".{entry.name}.partial")
    try:
        if path == partial:  # without a lease; one that another begins now makes this fail
            path.rmdir()
            return True
        if path == entry.place and entry.state == "damaged" and not find_damage(path):
            return False  # recomputed meanwhile
        gone = path.rename(entry.place.with_name(f".{entry.name}.gone-{secrets.token_hex(4)}"))
        with contextlib.suppress(OSError):
            partial.rmdir()
    except OSError:
        return False
    shutil.rmtree(gone, ignore_errors=True)
    return not gone.exists()

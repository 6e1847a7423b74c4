"""`task=status`: what is done, running, stalled, failed and missing, of a store and of a sweep."""

import json
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hydra.plugins.launcher import Launcher
from omegaconf import DictConfig
from rich import box
from rich.console import Group
from rich.markup import escape
from rich.table import Table

from clipsae.overrides import flat
from clipsae.store.survey import Entry, short, survey
from clipsae.tasks.sweep import Cell, cells_of, configs_of
from clipsae.tasks.table import terminal

KNOWN = ("model", "dataset", "clip", "latents", "k", "seed")
COLOURS = {
    "done": "green",
    "running": "cyan",
    "stalled": "yellow",
    "failed": "red",
    "damaged": "red",
    "missing": "dim",
    "left over": "dim",
}
LAST = ("state", "host", "when", "")  # columns; the last one says how far, or why not
State = tuple[Cell, str, Entry | None]


def run(cfg: DictConfig) -> None:
    """Print what is in the store."""
    show(cfg, [])


def show_sweep(launcher: Launcher, job_overrides: Sequence[Sequence[str]]) -> None:
    """Print what is in the store, and how far each cell of a sweep is: in place of its jobs."""
    configs = configs_of(launcher, job_overrides)
    show(launcher.config, cells_of(configs, job_overrides))


def show(cfg: DictConfig, cells: list[Cell]) -> None:
    """Print the stages, or of a sweep its cells and how many there are in each state."""
    root = cfg.paths.output_dir
    entries = survey(Path(root))
    states = states_of(cells, entries)
    if cfg.task.json:
        print(json.dumps(as_json(root, entries, states), indent=2))
        return
    console = terminal(100)
    what = f"store  {root}" if entries else f"nothing yet in {root}"
    console.print(what, soft_wrap=True, highlight=False)
    if not cells:
        for kind in dict.fromkeys(entry.kind for entry in entries):
            console.print(stage_table([entry for entry in entries if entry.kind == kind]))
        return
    console.print(cell_table(states))
    counts = Counter(state for _, state, _ in states)
    console.print(", ".join(f"{n} {state}" for state, n in counts.most_common()))
    for why in dict.fromkeys(cell.why for cell in cells if cell.why):
        console.print(f"not known: {why}", markup=False, highlight=False)


def states_of(cells: list[Cell], entries: list[Entry]) -> list[State]:
    """How far each cell is, and what in the store says so; finished entries count before what was
    left over."""
    places: dict[Path, Entry] = {}
    for entry in entries:
        if entry.state != "left over" and (entry.state != "damaged" or entry.place not in places):
            places[entry.place] = entry
    return [(cell, *cell.state(places)) for cell in cells]


def detail(entry: Entry) -> str:
    """How far, or why not, in a few words."""
    owner = entry.owner
    if entry.state == "running" and owner is not None:
        far = "" if owner.done is None else f"step {owner.done:,} of {owner.total:,}, "
        return f"{far}process {owner.pid}" + (f", SLURM job {owner.job}" if owner.job else "")
    if entry.state == "stalled":
        if entry.step is None:
            return "no checkpoint"
        total = f" of {owner.total:,}" if owner is not None and owner.total else ""
        return f"checkpoint at step {entry.step:,}{total}"
    return entry.why or ""


def stage_table(entries: list[Entry]) -> Group:
    """One row a folder of one kind."""
    apart = differences(entries)
    rows = [
        (_known(entry) or {"name": entry.name})
        | apart.get(entry.name, {})
        | _shown(entry.state, entry)
        for entry in entries
    ]
    return _table(f"{entries[0].kind}: {len(entries)}", rows)


def differences(entries: list[Entry]) -> dict[str, dict[str, str]]:
    """By name what sets an entry apart from those of the same model, dataset, ...: the end of its
    name, and up to three settings that differ."""
    alike: dict[str, dict[str, dict[str, str]]] = defaultdict(dict)
    for entry in entries:
        alike[str(_known(entry))][entry.name] = dict(flat(entry.key))
    found = {}
    for keys in alike.values():
        names = sorted({name for key in keys.values() for name in key})
        names = [n for n in names if len({key.get(n) for key in keys.values()}) > 1]
        names.sort(key=lambda name: name != "sae" and not name.endswith("max_steps"))
        for entry_name, key in keys.items() if len(keys) > 1 else ():
            settings = [f"{n.rpartition('.')[2]}={short(key[n])}" for n in names[:3] if n in key]
            found[entry_name] = {"name": short(entry_name), "differs in": " ".join(settings)}
    return found


def _known(entry: Entry) -> dict[str, Any]:
    return {n: entry.about[n] for n in KNOWN if entry.about.get(n) is not None}


def cell_table(states: list[State]) -> Group:
    """One row a cell of the sweep; those of which nothing is known but that they are missing share
    one where they differ in one option alone."""
    rows: list[dict[str, Any]] = []
    missing: list[dict[str, str]] = []
    for cell, state, entry in states:
        shown = _shown(state, entry)
        if state == "missing" and entry is not None:
            shown |= {"host": "", "when": "", "": "its SAE is trained"}
        elif entry is not None and state != "done" and shown[""]:
            shown[""] = f"{entry.kind}: {shown['']}"
        (rows if entry else missing).append({**cell.about, **shown})
    for name in sorted({name for row in missing for name in row}):
        groups: dict[tuple[tuple[str, str], ...], list[str]] = defaultdict(list)
        for row in missing:
            groups[tuple((n, v) for n, v in row.items() if n != name)].append(row.get(name, ""))
        missing = [{name: ", ".join(dict.fromkeys(v)), **dict(rest)} for rest, v in groups.items()]
    return _table(f"cells of the sweep: {len(states)}", rows + missing)


def _table(title: str, rows: list[dict[str, Any]]) -> Group:
    """A title and a table; of several rows what is the same in all is stated in the title, once."""
    about = {name for row in rows for name in row} - set(LAST)
    order = ("name", *KNOWN, "differs in")
    known = [name for name in order if name in about]
    columns = [*known, *sorted(about - set(order)), *LAST[:-1]]
    values = {name: {str(row.get(name, "")) for row in rows} for name in columns}
    values["host"].discard("")  # of what is missing
    same = [c for c in (*about, "host") if len(values[c]) == 1 and len(rows) > 1]
    shared = [f"{name} {min(values[name])}" for name in columns if name in same]
    columns = [name for name in columns if name not in same and values[name] - {""}]
    columns += [""] * any(row.get("") for row in rows)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for name in columns:
        table.add_column(name, overflow="fold")
    for row in rows:
        table.add_row(*(str(row.get(name, "")) for name in columns))
    return Group(", ".join([f"[bold]{title}[/]", *map(escape, shared)]), table)


def _shown(state: str, entry: Entry | None) -> dict[str, str]:
    """The last columns of a row."""
    host, when, more = "", "", ""
    if entry is not None:
        host, more = entry.host or "", escape(detail(entry))
        when = (entry.when or "")[5:16]  # without the year and the seconds
    return dict(zip(LAST, (f"[{COLOURS[state]}]{state}[/]", host, when, more), strict=True))


def as_json(root: str, entries: list[Entry], states: list[State]) -> dict[str, Any]:
    """The same for a program: every stage, every cell with its stage's name, and the counts."""
    return {
        "store": str(root),
        "stages": [
            {**asdict(entry), "path": str(entry.path), "key": dict(entry.key)} for entry in entries
        ],
        "cells": [
            {
                **cell.about,
                "state": state,
                "stages": [f"{s.path.parent.name}/{s.path.name}" for s in cell.stages],
                "stage": entry and f"{entry.kind}/{entry.name}",
                "detail": cell.why or (detail(entry) if entry else ""),
            }
            for cell, state, entry in states
        ],
        "counts": dict(Counter(state for _, state, _ in states)),
    }

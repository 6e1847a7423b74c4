"""`task=status`: what is done, running, stalled, failed and missing, of a store and of a sweep."""

import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf
from rich.markup import escape
from rich.table import Table

from clipsae.errors import ConfigError
from clipsae.store.survey import Entry, survey
from clipsae.tasks.table import terminal

CELL = ("model", "dataset", "clip", "latents", "k", "seed")
COLOURS = {
    "done": "green",
    "running": "cyan",
    "stalled": "yellow",
    "failed": "red",
    "damaged": "red",
    "missing": "dim",
    "left over": "dim",
}
# What is shown of several stages that fit one cell, the best first.
BEST = ("done", "running", "failed", "stalled", "damaged")


@dataclass(frozen=True)
class Cell:
    """One job of a sweep.

    Attributes:
        about: what it is known by: some of model, dataset, k, seed.
        state: done · running · stalled · failed · missing.
        entry: the stage that says so, or None; the SAE's where the cell's own has not begun.
    """

    about: Mapping[str, Any]
    state: str
    entry: Entry | None = None


def run(cfg: DictConfig) -> None:
    """Print the stages, the cells of the sweep if one is named, and how many there are of each.

    Raises:
        ConfigError: a sweep's job of its own, or cells that cannot be told.
    """
    if HydraConfig.get().mode.name == "MULTIRUN":
        raise ConfigError("task=status looks at a whole sweep at once: leave out -m")
    entries = survey(Path(cfg.paths.output_dir))
    wanted = wanted_cells(cfg)
    cells = [find_cell(about, entries, cfg.task.kind) for about in wanted]
    if cfg.task.json:
        print(json.dumps(as_json(cfg.paths.output_dir, entries, cells), indent=2))
        return
    console = terminal(140)
    if not entries:
        console.print(f"nothing yet in {cfg.paths.output_dir}", soft_wrap=True)
    else:
        console.print(stage_table(entries, cfg.paths.output_dir))
    if cells:
        console.print(cell_table(cells))
        counts = Counter(cell.state for cell in cells)
        console.print(", ".join(f"{n} {state}" for state, n in counts.most_common()))


def wanted_cells(cfg: DictConfig) -> list[dict[str, Any]]:
    """The cells that are asked for: `task.models` x `task.datasets`, or the chosen sweep's.

    Raises:
        ConfigError: the sweep sweeps what a stage is not known by.
    """
    task = cfg.task
    if task.models or task.datasets:
        choices = {"model": list(task.models or []), "dataset": list(task.datasets or [])}
        return combine({name: values for name, values in choices.items() if values})
    params = HydraConfig.get().sweeper.get("params") or {}
    return combine(swept(f"{key}={value}" for key, value in params.items()))


def swept(overrides: Iterable[str]) -> dict[str, list[Any]]:
    """What a sweep's parameters run over, by the names of `CELL`.

    Args:
        overrides: "model=topk,relu", "seed=range(0,3)", "dataset=glob(*)" ...

    Raises:
        ConfigError: a parameter that is not one of `CELL`'s.
    """
    hydra = GlobalHydra.instance()
    loader = hydra.config_loader() if hydra.is_initialized() else None
    choices = {}
    for override in OverridesParser.create(config_loader=loader).parse_overrides(list(overrides)):
        name = override.key_or_group.rpartition(".")[2]
        several = override.is_sweep_override()
        if name in CELL:
            values = list(override.sweep_iterator()) if several else [override.value()]
            choices[name] = [name_of(override.key_or_group, value) for value in values]
        elif several:
            raise ConfigError(
                f"the sweep runs over {override.key_or_group}: task=status tells cells by "
                f"{', '.join(CELL)}; name them with task.models and task.datasets"
            )
    return choices


def name_of(group: str, choice: Any) -> Any:
    """What a choice of a config group calls itself (`clip=vit_b_16` is "ViT-B-16-quickgelu"); any
    other value as it is."""
    file = Path(os.environ["CLIPSAE_ROOT"], "conf", group, f"{choice}.yaml")
    return OmegaConf.load(file).get("name", choice) if file.is_file() else choice


def combine(choices: Mapping[str, list[Any]]) -> list[dict[str, Any]]:
    """Every combination, in the order of the names; none where there are no choices."""
    if not choices:
        return []
    return [dict(zip(choices, values, strict=True)) for values in product(*choices.values())]


def find_cell(about: Mapping[str, Any], entries: list[Entry], kind: str) -> Cell:
    """How far a cell is: by its own stage, or else by the SAE that it waits for.

    A cell is known by what is in `about`, not by the whole config: of several stages that fit, the
    best is shown.
    """
    own = best(e for e in entries if e.kind == kind and fits(about, e))
    if own is not None:
        return Cell(about, "missing" if own.state == "damaged" else own.state, own)
    of_sae = {name: value for name, value in about.items() if name != "dataset"}
    sae = best(e for e in entries if e.kind == "sae" and fits(of_sae, e)) if of_sae else None
    if sae is None or sae.state in ("done", "damaged"):
        return Cell(about, "missing", sae)
    return Cell(about, sae.state, sae)


def fits(about: Mapping[str, Any], entry: Entry) -> bool:
    return all(name in entry.about and entry.about[name] == value for name, value in about.items())


def best(entries: Iterable[Entry]) -> Entry | None:
    """The best of the stages that fit: by state, then the newest."""
    found = [entry for entry in entries if entry.state in BEST]
    found.sort(key=lambda entry: entry.when or "", reverse=True)
    return min(found, key=lambda entry: BEST.index(entry.state), default=None)


def detail(entry: Entry) -> str:
    """How far, or why not, in a few words."""
    owner = entry.owner
    if entry.state == "running" and owner is not None:
        far = "" if owner.done is None else f"step {owner.done:,} of {owner.total:,}, "
        return f"{far}process {owner.pid}" + (f", SLURM job {owner.job}" if owner.job else "")
    if entry.state == "stalled":
        if entry.step is None:
            return "no checkpoint"
        of = f" of {owner.total:,}" if owner is not None and owner.total else ""
        return f"checkpoint at step {entry.step:,}{of}"
    return entry.why or ""


def stage_table(entries: list[Entry], root: str) -> Table:
    """One row a folder of the store."""
    known = [entry.about or {"model": entry.name} for entry in entries]
    columns = [name for name in CELL if any(about.get(name) is not None for about in known)]
    table = _table(f"Stages in {root}", ["kind", *columns])
    for entry, about in zip(entries, known, strict=True):
        table.add_row(entry.kind, *_known(about, columns), *_told(entry.state, entry))
    return table


def cell_table(cells: list[Cell]) -> Table:
    """One row a cell of the sweep."""
    columns = list(cells[0].about)
    table = _table("Cells of the sweep", columns)
    for cell in cells:
        state, host, when, words = _told(cell.state, cell.entry)
        if cell.entry is not None and cell.entry.kind == "sae":
            words = "its SAE is trained" if cell.entry.state == "done" else f"its SAE: {words}"
        table.add_row(*_known(cell.about, columns), state, host, when, words)
    return table


def _table(title: str, columns: list[str]) -> Table:
    table = Table(title=title, title_justify="left")
    for heading in (*columns, "state", "host", "when", ""):
        table.add_column(heading, overflow="fold")
    return table


def _known(about: Mapping[str, Any], columns: list[str]) -> list[str]:
    return ["" if about.get(name) is None else str(about[name]) for name in columns]


def _told(state: str, entry: Entry | None) -> list[str]:
    shown = f"[{COLOURS[state]}]{state}[/]"
    if entry is None:
        return [shown, "", "", ""]
    return [shown, entry.host or "", entry.when or "", escape(detail(entry))]


def as_json(root: str, entries: list[Entry], cells: list[Cell]) -> dict[str, Any]:
    """The same for a program: every stage, every cell with its stage's name, and the counts."""
    return {
        "store": str(root),
        "stages": [
            {**asdict(entry), "path": str(entry.path), "key": dict(entry.key)} for entry in entries
        ],
        "cells": [
            {
                **cell.about,
                "state": cell.state,
                "stage": cell.entry and f"{cell.entry.kind}/{cell.entry.name}",
                "detail": detail(cell.entry) if cell.entry else "",
            }
            for cell in cells
        ],
        "counts": dict(Counter(cell.state for cell in cells)),
    }

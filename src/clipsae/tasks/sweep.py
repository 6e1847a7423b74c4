"""The cells of a sweep: which stages each of them makes, how far they are, how long it takes."""

import statistics
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig
from rich.markup import escape
from rich.table import Table

from clipsae.data import ImageDataset
from clipsae.data.scenes.world import IMAGE_SIZE
from clipsae.errors import ConfigError
from clipsae.store import MARK, Stage, Store
from clipsae.store.files import read_json
from clipsae.store.survey import Entry
from clipsae.tasks import build
from clipsae.tasks.guidance import resolve_k
from clipsae.tasks.outcome import duration
from clipsae.tasks.stages import evaluation, sae
from clipsae.tasks.table import terminal

BEST = ("running", "failed", "stalled")  # of a cell's unfinished stages the one shown
SHOWN = 10  # latents kept, of the accuracy that a sweep's summary shows
_ANY_SIZE = 224  # pixels; no key of a stage depends on it


@dataclass(frozen=True)
class Cell:
    """One job of a sweep.

    Attributes:
        about: what sets it apart: the sweep's overrides, by their last names.
        stages: of the store, in the order in which they are made: an SAE and what is made of it.
        why: why its stages are not known; None: they are.
    """

    about: Mapping[str, str]
    stages: tuple[Stage, ...] = ()
    why: str | None = None

    def state(self, entries: Mapping[Path, Entry]) -> tuple[str, Entry | None]:
        """done · running · failed · stalled · missing, and what in the store says so: of a cell
        that is missing its SAE, if that is done."""
        found = [entries.get(stage.path) for stage in self.stages]
        states = ["missing" if e is None or e.state == "damaged" else e.state for e in found]
        if states and all(state == "done" for state in states):
            return "done", found[-1]
        for state in BEST:
            if state in states:
                return state, found[states.index(state)]
        return "missing", found[0] if states and states[0] == "done" else None


def cells_of(configs: Sequence[DictConfig], job_overrides: Sequence[Sequence[str]]) -> list[Cell]:
    """What each job of a sweep makes.

    Each dataset is opened once, as a run would do; no weights are loaded.

    Args:
        configs: of the jobs, as `outcome.configs_of` composes them.
        job_overrides: by which the cells are called.
    """
    before = HydraConfig.instance().cfg
    found: dict[str, ImageDataset] = {}
    cells = []
    try:
        for config, label in zip(configs, labels_of(job_overrides), strict=True):
            HydraConfig.instance().set_config(config)  # which says where plugins are
            try:
                cells.append(Cell(label, stages_of(deepcopy(config), found)))
            except ConfigError as error:
                cells.append(Cell(label, why=str(error)))
    finally:
        HydraConfig.instance().cfg = before
    return cells


def stages_of(cfg: DictConfig, found: dict[str, ImageDataset]) -> tuple[Stage, ...]:
    """The stages of one job of `task=experiment`.

    Args:
        cfg: of the job; `model.k=auto` is replaced by what it stands for.
        found: the datasets by config and split; those opened here are added.

    Raises:
        ConfigError: the dataset is not there, or `model.k=auto` has nothing to learn from yet.
    """

    def dataset(node: DictConfig, split: str) -> ImageDataset:
        key = f"{split} {build.plain(node)}"
        if key not in found:
            scenes = str(node.get("_target_")).endswith(".ScenesDataset")
            found[key] = build.build_dataset(node, split, IMAGE_SIZE if scenes else _ANY_SIZE)
        return found[key]

    store = Store(cfg.paths.output_dir)
    resolve_k(cfg, store)
    trained = sae.stage(cfg, store, dataset(cfg.train_dataset, "train"))
    test_set = dataset(cfg.dataset, cfg.evaluation.split)
    evaluated = evaluation.stage(cfg, store, trained, test_set)
    return (trained,) if evaluated is None else (trained, evaluated)


def labels_of(job_overrides: Sequence[Sequence[str]]) -> list[dict[str, str]]:
    """What each job is known by: the overrides that are not the same for all, and its model and
    dataset where they are given."""
    parsed = []
    for overrides in job_overrides:
        parts = OverridesParser.create().parse_overrides(list(overrides))
        values = {p.key_or_group: str(p.get_value_element_as_str()) for p in parts}
        parsed.append({k: v for k, v in values.items() if not k.startswith("hydra")})
    names = [
        name
        for name in dict.fromkeys(name for values in parsed for name in values)
        if name in ("model", "dataset") or len({values.get(name) for values in parsed}) > 1
    ]
    last = [name.rpartition(".")[2] for name in names]
    short = {n: end if last.count(end) == 1 else n for n, end in zip(names, last, strict=True)}
    return [{short[name]: values.get(name, "") for name in names} for values in parsed]


# --- before and after ---


def forecast(cells: list[Cell]) -> str:
    """How much a sweep is, how much of it is there, and how long the rest takes one after the
    other, where the store knows the times of such work."""
    stages = list({stage.path: stage for cell in cells for stage in cell.stages}.values())
    missing = [stage for stage in stages if not stage.finished]
    open_cells = [c for c in cells if c.why or any(not s.finished for s in c.stages)]
    saes = [stage for stage in stages if stage.path.parent.name == "sae"]
    to_train = sum(stage in missing for stage in saes)
    said = (
        f"{_count(len(cells), 'cell')}, {len(cells) - len(open_cells)} of them finished; "
        f"{_count(len(saes), 'SAE')}, {to_train} to train"
    )
    if unknown := [cell.why for cell in cells if cell.why]:
        return f"{said}; not known yet for {_count(len(unknown), 'cell')} ({unknown[0]})"
    if not missing:
        return said
    seconds = [estimate(stage) for stage in missing]
    known = [s for s in seconds if s is not None]
    if len(known) < len(seconds):
        return f"{said}; how long it takes is not known: the store has no such work yet"
    return (
        f"{said}; about {duration(sum(known))}, one after the other, by the times of such work here"
    )


def estimate(stage: Stage) -> float | None:
    """Seconds that a stage takes by the finished ones of its kind: of the same model if there are,
    a training by the images it reads; None: there are none."""
    marks = [read_json(mark) for mark in stage.path.parent.glob(f"[!.]*/{MARK}")]
    alike = [m for m in marks if _same(m, stage, ("clip", "latents")) and "seconds" in m]
    if stage.path.parent.name != "sae":
        alike = [m for m in alike if _same(m, stage, ("dataset",))]
    alike = [m for m in alike if _same(m, stage, ("model",))] or alike
    if not alike:
        return None
    return statistics.median(m["seconds"] / _reads(m["key"]) for m in alike) * _reads(stage.key)


def _same(mark: Mapping[str, Any], stage: Stage, names: tuple[str, ...]) -> bool:
    about = mark.get("about", {})
    return all(about.get(name) == stage.about.get(name) for name in names)


def _reads(key: Mapping[str, Any]) -> int:
    """Images that a training reads, by the key of its SAE; 1 of other stages."""
    training = key.get("training", {})
    steps = training.get("trainer", training).get("max_steps", 1)
    batch = training.get("features", training).get("batch_size", 1)
    return steps * batch * training.get("batches_a_step", 1)


def summary(cells: list[Cell], failed: Sequence[bool]) -> tuple[str, Table]:
    """A title, and accuracy by model and dataset with how long each row's work took."""
    datasets = list(dict.fromkeys(cell.about.get("dataset", "") for cell in cells))
    rows: dict[str, dict[str, str]] = {}
    work: dict[str, dict[Path, float]] = {}
    columns = set()
    for cell, broken in zip(cells, failed, strict=True):
        row = _row(cell.about)
        column, text = accuracy(cell)
        columns |= {column} - {""}
        ended = "[red]failed[/]" if broken else "" if cell.stages else "done"
        rows.setdefault(row, {})[cell.about.get("dataset", "")] = text or ended
        for stage in cell.stages:
            seconds = read_json(stage.path / MARK).get("seconds")
            if seconds is not None:
                work.setdefault(row, {})[stage.path] = float(seconds)
    done = sum(
        all(stage.finished for stage in cell.stages) and not (broken and not cell.stages)
        for cell, broken in zip(cells, failed, strict=True)
    )
    what = f": macro accuracy, %, {', '.join(sorted(columns))}" if columns else ""
    table = Table()
    table.add_column("")
    for name in datasets:
        table.add_column(escape(name), justify="right", overflow="fold")
    table.add_column("time", justify="right")
    for row, found in rows.items():
        took = duration(sum(work[row].values())) if row in work else ""
        table.add_row(escape(row), *(found.get(name, "") for name in datasets), took)
    return f"{done} of {len(cells)} cells are finished{what}", table


def accuracy(cell: Cell) -> tuple[str, str]:
    """Which accuracy of a finished cell a summary shows, such as "on_10", and the figure."""
    for stage in cell.stages:
        file = stage.path / "results.csv"
        if stage.path.parent.name != "evaluation" or not file.is_file():
            continue
        rows = pd.read_csv(file)
        on = rows[rows.setting == "on"].set_index("n").accuracy
        if len(on):
            n = min(on.index, key=lambda n: abs(n - SHOWN))
            return f"on_{int(n)}", f"{on[n]:.2f}"
    done = bool(cell.stages) and all(stage.finished for stage in cell.stages)
    return "", "done" if done else ""


def print_summary(cells: list[Cell], failed: Sequence[bool]) -> None:
    title, table = summary(cells, failed)
    console = terminal()
    console.print(title, highlight=False, soft_wrap=True)
    console.print(table)


def _row(about: Mapping[str, str]) -> str:
    others = (f"{k}={v}" for k, v in about.items() if k not in ("model", "dataset"))
    return " ".join([about.get("model", ""), *others]).strip()


def _count(n: int, what: str) -> str:
    return f"{n} {what}" + ("s" if n != 1 else "")

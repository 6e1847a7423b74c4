"""A multirun: its cells, the stages of the store that they make, the jobs that make them, what is
said before it begins and how it ended.

torch and lightning, which know what decides a stage, take seconds to import: they are imported when
the stages are asked for.
"""

import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn, JobStatus, filter_overrides
from hydra.plugins.launcher import Launcher
from omegaconf import DictConfig
from rich.markup import escape
from rich.table import Table

from clipsae.errors import ConfigError
from clipsae.store import MARK, Stage, Store
from clipsae.store.files import read_json
from clipsae.store.survey import Entry
from clipsae.tasks.composing import Composer
from clipsae.tasks.table import terminal

if TYPE_CHECKING:
    from clipsae.data import ImageDataset

EXPERIMENT = "clipsae.tasks.experiment.run"
TRAIN_ONLY = ("evaluation.settings=[]", "measurement.metrics=[]")
UNFINISHED = ("running", "failed", "stalled")  # of a cell's stages the first of these is shown
SHOWN = 10  # latents kept, of the accuracy that a sweep's summary shows
_COLUMNS = ("model", "dataset")  # of a summary, beside its rows
_ANY_SIZE = 224  # pixels; no key of a stage depends on it


@dataclass(frozen=True)
class Outcome:
    """How one job ended."""

    cell: str  # its overrides
    why: str | None = None  # the last line of what went wrong; None: it is done
    log: str | None = None  # where more is to be read

    def __str__(self) -> str:
        return f"{self.cell}: {'done' if self.why is None else f'FAILED: {self.why}'}"


@dataclass(eq=False)
class Job:
    """What a launcher starts as one process."""

    name: str  # for messages
    cells: list[int]  # numbers of the cells that it runs; of a training those that need it
    numbers: list[int]  # Hydra's job numbers
    overrides: list[list[str]]  # of what it runs, for each number
    after: "Job | None" = None  # the training that it waits for
    trains: bool = False  # whether it only trains an SAE, which several cells need
    handle: Any = None  # submitit's job, once it is submitted
    outcome: Outcome | None = None  # once it is over

    @property
    def is_open(self) -> bool:
        """Whether it is yet to be submitted."""
        return self.handle is None and self.outcome is None


@dataclass(frozen=True)
class Cell:
    """One point of a sweep."""

    about: Mapping[str, str]  # what sets it apart: overrides, by their last names
    stages: tuple[Stage, ...] = ()  # in the order in which they are made: SAE, evaluation
    why: str | None = None  # why its stages are not known; None: they are

    @property
    def finished(self) -> bool:
        return bool(self.stages) and all(stage.finished for stage in self.stages)

    def state(self, entries: Mapping[Path, Entry]) -> tuple[str, Entry | None]:
        """done · running · failed · stalled · missing, and what in the store says so: of a cell
        that is missing its SAE, if that is done.

        Args:
            entries: of the store, by the folder of the finished work.
        """
        found = [entries.get(stage.path) for stage in self.stages]
        states = ["missing" if e is None or e.state == "damaged" else e.state for e in found]
        if set(states) == {"done"}:
            return "done", found[-1]
        for state in UNFINISHED:
            if state in states:
                return state, found[states.index(state)]
        return "missing", found[0] if states and states[0] == "done" else None


# --- what the cells are ---


def configs_of(launcher: Launcher, job_overrides: Sequence[Sequence[str]]) -> list[DictConfig]:
    """The config that each job of a sweep runs with.

    Raises:
        ConfigError: an invalid value in one of them, before any of them begins.
    """
    composer = Composer(launcher)
    return [composer.config(overrides) for overrides in job_overrides]


@contextmanager
def as_job(config: DictConfig) -> Iterator[None]:
    """Hydra's config is that of a job within the block: it says where plugins are."""
    before = HydraConfig.instance().cfg
    HydraConfig.instance().set_config(config)
    try:
        yield
    finally:
        HydraConfig.instance().cfg = before


def cells_of(configs: Sequence[DictConfig], job_overrides: Sequence[Sequence[str]]) -> list[Cell]:
    """What each job of a sweep makes.

    Each dataset is opened once, as a run would do; no weights are loaded.

    Args:
        configs: of the jobs, as `configs_of` composes them.
        job_overrides: by which the cells are called.
    """
    datasets: dict[str, ImageDataset] = {}
    cells = []
    for config, about in zip(configs, abouts(job_overrides), strict=True):
        config = deepcopy(config)  # Hydra makes that of a job read-only, and `auto` is replaced
        with as_job(config):
            try:
                cells.append(Cell(about, stages_of(config, datasets)))
            except ConfigError as error:
                cells.append(Cell(about, why=str(error)))
    return cells


def stages_of(cfg: DictConfig, datasets: "dict[str, ImageDataset]") -> tuple[Stage, ...]:
    """The stages of one job of `task=experiment`.

    Args:
        cfg: of the job; what is `auto` in it is replaced by what it stands for.
        datasets: by config and split; those opened here are added.

    Raises:
        ConfigError: the dataset is not there, or `auto` (see `guidance`) has nothing to learn from.
    """
    from clipsae.data.scenes.world import IMAGE_SIZE
    from clipsae.tasks import build, guidance, precision
    from clipsae.tasks.stages import evaluation, sae

    def dataset(node: DictConfig, split: str) -> "ImageDataset":
        key = f"{split} {build.plain(node)}"
        if key not in datasets:
            scenes = str(node.get("_target_")).endswith(".ScenesDataset")
            datasets[key] = build.build_dataset(node, split, IMAGE_SIZE if scenes else _ANY_SIZE)
        return datasets[key]

    store = Store(cfg.paths.output_dir)
    guidance.resolve(cfg, store)
    train_set = dataset(cfg.train_dataset, "train")
    trained = precision.resolve(cfg, lambda: sae.stage(cfg, store, train_set))
    test_set = dataset(cfg.dataset, cfg.evaluation.split)
    evaluated = evaluation.stage(cfg, store, trained, test_set)
    return (trained,) if evaluated is None else (trained, evaluated)


def job_names(job_overrides: Sequence[Sequence[str]]) -> list[str]:
    """What each job is called: the overrides that are not the same for all of them."""
    jobs = [filter_overrides(overrides) for overrides in job_overrides]
    common = set(jobs[0]).intersection(*jobs) if len(jobs) > 1 else set()
    return [" ".join(o for o in overrides if o not in common) for overrides in jobs]


def abouts(job_overrides: Sequence[Sequence[str]]) -> list[dict[str, str]]:
    """What sets each job apart, by option: those that are not the same for all, and its model and
    dataset where they are given. Options by their last names, where that tells them apart."""
    jobs = [
        {name.lstrip("+~"): value for name, _, value in (o.partition("=") for o in overrides)}
        for overrides in map(filter_overrides, job_overrides)
    ]
    differ = [
        name
        for name in dict.fromkeys(name for job in jobs for name in job)
        if name in ("model", "dataset") or len({job.get(name) for job in jobs}) > 1
    ]
    ends = [name.rpartition(".")[2] for name in differ]
    short = [end if ends.count(end) == 1 else n for n, end in zip(differ, ends, strict=True)]
    return [dict(zip(short, (job.get(n, "") for n in differ), strict=True)) for job in jobs]


# --- before ---


def forecast(cells: Sequence[Cell]) -> str:
    """How much a sweep is, how much of it is there, and how long the rest takes one after the
    other, where the store knows the times of such work."""
    stages = {stage.path: stage for cell in cells for stage in cell.stages}
    missing = [stage for stage in stages.values() if not stage.finished]
    saes = [path for path in stages if path.parent.name == "sae"]
    to_train = sum(stage.path in saes for stage in missing)
    counts = (
        f"{counted(len(cells), 'cell')}, {sum(cell.finished for cell in cells)} of them finished; "
        f"{counted(len(saes), 'SAE')}, {to_train} to train"
    )
    if unknown := [cell.why for cell in cells if cell.why]:
        return f"{counts}; not known yet for {counted(len(unknown), 'cell')} ({unknown[0]})"
    if not missing:
        return counts
    seconds = [estimate(stage) for stage in missing]
    if None in seconds:
        return f"{counts}; how long it takes is not known: the store has no such work yet"
    took = duration(sum(s or 0 for s in seconds))
    return f"{counts}; about {took}, one after the other, by the times of such work here"


def estimate(stage: Stage) -> float | None:
    """Seconds that a stage takes by the finished ones of its kind: of the same model if there are,
    a training by the images it reads; None: there are none."""
    marks = [read_json(mark) for mark in stage.path.parent.glob(f"[!.]*/{MARK}")]
    same = (
        ("clip", "latents") if stage.path.parent.name == "sae" else ("clip", "latents", "dataset")
    )
    alike = [m for m in marks if "seconds" in m and _same(m, stage, same)]
    # What is untrained or fitted says nothing about a training, nor the other way round.
    trains = _reads(stage.key) > 1
    alike = [m for m in alike if (_reads(m["key"]) > 1) == trains]
    alike = [m for m in alike if _same(m, stage, ["model"])] or alike
    if not alike:
        return None
    image = statistics.median(m["seconds"] / max(_reads(m["key"]), 1) for m in alike)
    return image * max(_reads(stage.key), 1)


def _same(mark: Mapping[str, Any], stage: Stage, names: Sequence[str]) -> bool:
    about = mark.get("about", {})
    return all(about.get(name) == stage.about.get(name) for name in names)


def _reads(key: Mapping[str, Any]) -> int:
    """Images that a training reads, by the key of its SAE: 0 of an untrained one; 1 of fitted ones
    and of other stages."""
    training = key.get("training", {})
    steps = training.get("trainer", training).get("max_steps", 1)
    batch = training.get("features", training).get("batch_size", 1)
    return steps * batch * training.get("batches_a_step", 1)


class Sweep:
    """What a multirun says before it begins and when it has ended, and its jobs.

    Attributes:
        names: of the jobs.
        configs: of the jobs.
    """

    def __init__(self, launcher: Launcher, job_overrides: Sequence[Sequence[str]]) -> None:
        self.names = job_names(job_overrides)
        self.configs = configs_of(launcher, job_overrides)
        self._overrides = [list(overrides) for overrides in job_overrides]
        self._begun = time.monotonic()
        self._cells: list[Cell] = []
        if len(job_overrides) == 1:  # which says itself what it does
            return
        if launcher.config.task.get("_target_") == EXPERIMENT:
            self._look()
            print(forecast(self._cells), flush=True)
        else:
            print(f"{len(job_overrides)} jobs", flush=True)

    def _look(self) -> None:
        """See which stages the cells make, by what the store holds now."""
        self._cells = cells_of(self.configs, self._overrides)

    def plan(
        self, groups: Sequence[list[int]], *, again: bool = False
    ) -> tuple[list[Job], list[list[int]]]:
        """The jobs of a sweep: an SAE that is missing and that several cells need is trained by a
        job of its own, which theirs wait for.

        Args:
            groups: the cells by number, those of one job together.
            again: which SAE these cells need was unknown (see `guidance`) and is asked again; those
                for which it still is get jobs that say why.

        Returns:
            The jobs in the order in which to submit them, and the groups whose SAE is unknown.
        """
        if again:
            self._look()
        jobs, unknown = [], []
        by_sae: dict[Path, list[Job]] = {}
        for group in groups:
            cell = self._cells[group[0]] if self._cells else Cell({})
            if cell.why and not again:
                unknown.append(group)
                continue
            name = ", ".join(self.names[i] for i in group)
            jobs.append(Job(name, group, group, [self._overrides[i] for i in group]))
            if len(group) == 1 and cell.stages and not cell.stages[0].finished:
                by_sae.setdefault(cell.stages[0].path, []).append(jobs[-1])
        trainings = []
        for path, waiting in by_sae.items():
            if len(waiting) > 1:
                cells = [i for job in waiting for i in job.cells]
                overrides = [*self._overrides[cells[0]], *TRAIN_ONLY]
                number = len(self._overrides) + cells[0]
                training = Job(f"training {path.name}", cells, [number], [overrides], trains=True)
                trainings.append(training)
                for job in waiting:
                    job.after = training
        return trainings + jobs, unknown

    def conclude(
        self, outcomes: Sequence[Outcome], groups: Sequence[Sequence[int]] | None = None
    ) -> None:
        """Print how all cells ended, what failed and why.

        Args:
            groups: the jobs of each outcome by number; None: one each.

        Raises:
            SystemExit: with status 1, if anything failed.
        """
        took = duration(time.monotonic() - self._begun)
        if self._cells:
            if not all(cell.finished for cell in self._cells):
                self._look()  # auto is known now, and the precision that jobs elsewhere chose
            ends = zip(outcomes, groups or [[i] for i in range(len(outcomes))], strict=True)
            failed = {i for outcome, group in ends if outcome.why is not None for i in group}
            title, table = summary(self._cells, failed)
            console = terminal()
            console.print(title, highlight=False, soft_wrap=True)
            console.print(table)
            print(f"in {took}", flush=True)
        elif len(outcomes) > 1:
            done = sum(outcome.why is None for outcome in outcomes)
            print(f"{done} of {len(outcomes)} jobs are done, in {took}", flush=True)
        conclude(outcomes)


# --- after ---


def outcome_of(done: JobReturn, cell: str) -> Outcome:
    """The outcome of a job that ran in this process."""
    if done.status == JobStatus.COMPLETED:
        return Outcome(cell)
    error = done._return_value  # `return_value` raises it
    message = str(error).strip().splitlines() or [""]
    name = "" if isinstance(error, ConfigError) else f"{type(error).__name__}: "
    job = done.hydra_cfg.hydra
    log = str(Path(job.runtime.output_dir, f"{job.job.name}.log"))
    return Outcome(cell, f"{name}{message[-1]}", log)


def summary(cells: Sequence[Cell], failed: set[int]) -> tuple[str, Table]:
    """A title, and accuracy by model and dataset with how long each row's work took.

    Args:
        failed: numbers of the cells.
    """
    rows: dict[str, dict[str, str]] = {}
    work: dict[str, dict[Path, float]] = {}
    columns = set()
    for i, cell in enumerate(cells):
        others = (f"{k}={v}" for k, v in cell.about.items() if v and k not in _COLUMNS)
        row = " ".join([cell.about.get("model", ""), *others]).strip()
        ended = "[red]failed[/]" if i in failed else "" if cell.stages else "done"
        column, text = accuracy(cell)
        columns |= {column} - {""}
        rows.setdefault(row, {})[cell.about.get("dataset", "")] = text or ended
        for stage in cell.stages:  # an SAE's time counts once
            seconds = read_json(stage.path / MARK).get("seconds")
            work.setdefault(row, {}).update({} if seconds is None else {stage.path: seconds})
    datasets = list(dict.fromkeys(cell.about.get("dataset", "") for cell in cells))
    table = Table("")
    for name in datasets:
        table.add_column(escape(name), justify="right", overflow="fold")
    table.add_column("time", justify="right")
    for row, found in rows.items():
        took = duration(sum(work[row].values())) if work.get(row) else ""
        table.add_row(escape(row), *(found.get(name, "") for name in datasets), took)
    done = sum(c.finished or not (c.stages or i in failed) for i, c in enumerate(cells))
    what = f": macro accuracy, %, {', '.join(sorted(columns))}" if columns else ""
    return f"{done} of {len(cells)} cells are finished{what}", table


def accuracy(cell: Cell) -> tuple[str, str]:
    """Which accuracy of a finished cell a summary shows, such as "on_10", and the figure."""
    for stage in cell.stages:
        file = stage.path / "results.csv"
        if file.is_file():
            rows = pd.read_csv(file)
            on = rows[rows.setting == "on"].set_index("n").accuracy
            if len(on):
                n = min(on.index, key=lambda n: abs(n - SHOWN))
                return f"on_{int(n)}", f"{on[n]:.2f}"
    return "", "done" if cell.finished else ""


def conclude(outcomes: Sequence[Outcome]) -> None:
    """Print what failed and why; nothing where all is done.

    Raises:
        SystemExit: with status 1, if anything failed.
    """
    failed = [outcome for outcome in outcomes if outcome.why is not None]
    if not failed:
        return
    table = Table(title=f"{len(failed)} of {len(outcomes)} jobs failed", title_justify="left")
    for heading in ("job", "why", "log"):
        table.add_column(heading, overflow="fold")
    for outcome in failed:
        table.add_row(*(escape(text or "") for text in (outcome.cell, outcome.why, outcome.log)))
    terminal(160).print(table)
    print("The same command goes on with what failed or is missing; finished work is used again.")
    sys.exit(1)


def duration(seconds: float) -> str:
    """Such as "40 s", "12 min", "3.5 h"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def counted(n: int, what: str) -> str:
    """Such as "1 cell", "2 cells"."""
    return f"{n} {what}" + ("s" if n != 1 else "")

"""What a multirun says: what it will do, and how its jobs ended."""

import logging
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.utils import JobReturn, JobStatus, filter_overrides
from hydra.plugins.launcher import Launcher
from rich.markup import escape
from rich.table import Table

from clipsae.errors import ConfigError
from clipsae.tasks.table import terminal

if TYPE_CHECKING:
    from clipsae.tasks.sweep import Cell

EXPERIMENT = "clipsae.tasks.experiment.run"
TRAIN_ONLY = ("evaluation.settings=[]", "measurement.metrics=[]")
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Outcome:
    """How one job ended.

    Attributes:
        cell: its overrides.
        why: the last line of what went wrong; None: it is done.
        log: where more is to be read.
    """

    cell: str
    why: str | None = None
    log: str | None = None

    def __str__(self) -> str:
        return f"{self.cell}: {'done' if self.why is None else f'FAILED: {self.why}'}"


@dataclass(eq=False)
class Job:
    """What a launcher starts as one process.

    Attributes:
        name: for messages.
        cells: the numbers of the sweep's cells that it runs; of a training those that need it.
        numbers: Hydra's job numbers, and
        overrides: the overrides of what it runs, one for each.
        after: the training that it waits for.
        trains: whether it only trains an SAE, which several cells need.
        handle: submitit's job, once it is submitted.
        outcome: once it is over.
    """

    name: str
    cells: list[int]
    numbers: list[int]
    overrides: list[list[str]]
    after: "Job | None" = None
    trains: bool = False
    handle: Any = None
    outcome: Outcome | None = None

    @property
    def is_open(self) -> bool:
        """Whether it is yet to be submitted."""
        return self.handle is None and self.outcome is None


def cells(job_overrides: Sequence[Sequence[str]]) -> list[str]:
    """What each job is called: the overrides that are not the same for all of them."""
    jobs = [filter_overrides(overrides) for overrides in job_overrides]
    common = set(jobs[0]).intersection(*jobs) if len(jobs) > 1 else set()
    return [" ".join(o for o in overrides if o not in common) for overrides in jobs]


def outcome_of(done: JobReturn, cell: str) -> Outcome:
    """The outcome of a job that ran in this process."""
    if done.status == JobStatus.COMPLETED:
        return Outcome(cell)
    error = done._return_value  # `return_value` raises it
    said = str(error).strip().splitlines() or [""]
    name = "" if isinstance(error, ConfigError) else f"{type(error).__name__}: "
    job = done.hydra_cfg.hydra
    return Outcome(
        cell, f"{name}{said[-1]}", str(Path(job.runtime.output_dir, f"{job.job.name}.log"))
    )


class Sweep:
    """What a multirun says before it begins and when it has ended.

    Attributes:
        names: of the jobs.
    """

    def __init__(self, launcher: Launcher, job_overrides: Sequence[Sequence[str]]) -> None:
        self.names = cells(job_overrides)
        self._jobs = launcher, job_overrides
        self._begun = time.monotonic()
        self._cells: list[Cell] = []
        # Other tasks make other things. A single job says itself what it does.
        if launcher.config.task.get("_target_") == EXPERIMENT and len(job_overrides) > 1:
            from clipsae.tasks.sweep import cells_of, forecast

            self._cells = cells_of(*self._jobs)
            print(forecast(self._cells), flush=True)

    def plan(
        self, groups: Sequence[list[int]], *, again: bool = False
    ) -> tuple[list[Job], list[list[int]]]:
        """The jobs of a sweep: an SAE that is missing and that several cells need is trained by a
        job of its own, which theirs wait for.

        Args:
            groups: the cells by number, those of one job together.
            again: which SAE these cells need was unknown (model.k=auto) and is asked again; those
                for which it still is get jobs that say why.

        Returns:
            The jobs in the order in which to submit them, and the groups whose SAE is unknown.
        """
        if again:
            from clipsae.tasks.sweep import cells_of

            self._cells = cells_of(*self._jobs)
        overrides = [list(some) for some in self._jobs[1]]
        jobs, unknown, by_sae = [], [], {}
        for group in groups:
            cell = self._cells[group[0]] if self._cells and len(group) == 1 else None
            if cell is not None and cell.why and not again:
                unknown.append(group)
                continue
            names = ", ".join(self.names[i] for i in group)
            job = Job(names, group, group, [overrides[i] for i in group])
            jobs.append(job)
            if cell is not None and cell.stages and not cell.stages[0].finished:
                by_sae.setdefault(cell.stages[0].path, []).append(job)
        trainings = []
        for path, some in by_sae.items():
            if len(some) > 1:
                first = some[0].cells[0]
                training = Job(
                    f"training {path.name}",
                    [i for job in some for i in job.cells],
                    [len(overrides) + first],
                    [[*overrides[first], *TRAIN_ONLY]],
                    trains=True,
                )
                trainings.append(training)
                for job in some:
                    job.after = training
        return trainings + jobs, unknown

    def conclude(
        self, outcomes: list[Outcome], groups: Sequence[Sequence[int]] | None = None
    ) -> None:
        """Print how all cells ended, what failed and why.

        Args:
            groups: the jobs of each outcome by number; None: one each.

        Raises:
            SystemExit: with status 1, if anything failed.
        """
        if self._cells:
            from clipsae.tasks.sweep import cells_of, duration, print_summary

            if any(cell.why for cell in self._cells):  # k=auto is known now
                self._cells = cells_of(*self._jobs)
            groups = groups or [[i] for i in range(len(outcomes))]
            ends = zip(outcomes, groups, strict=True)
            failed = {i for outcome, group in ends if outcome.why is not None for i in group}
            print_summary(self._cells, [i in failed for i in range(len(self._cells))])
            print(f"in {duration(time.monotonic() - self._begun)}", flush=True)
        conclude(outcomes)


def conclude(outcomes: list[Outcome]) -> None:
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
        table.add_row(*(escape(text) for text in (outcome.cell, outcome.why, outcome.log or "")))
    terminal(160).print(table)
    print("The same command goes on with what failed or is missing; finished work is used again.")
    sys.exit(1)

"""How the jobs of a multirun ended: one table at the end, and the exit status."""

import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hydra.core.utils import JobReturn, JobStatus, filter_overrides
from rich.markup import escape
from rich.table import Table

from clipsae.errors import ConfigError
from clipsae.tasks.table import terminal

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

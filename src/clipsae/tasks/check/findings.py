"""What the check finds: a line for each thing that it looked at."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field

import torch
from rich import box
from rich.markup import escape
from rich.table import Table

from clipsae.errors import ConfigError
from clipsae.store import StoreError
from clipsae.tasks.table import terminal

OK, WARNING, FAILS = "ok", "warning", "fails"
COLOURS = {OK: "green", WARNING: "yellow", FAILS: "red"}
NAMED = 2  # jobs that a line names; of more it says how many


@dataclass
class Line:
    """One thing that was looked at.

    Attributes:
        verdict: whether it would stop the work: ok, warning or fails.
        found, todo: what was found, and what to do about it.
        jobs: of the sweep, those that it is about; none: all.
        numbers: what was measured.
    """

    check: str
    verdict: str
    found: str
    todo: str = ""
    jobs: list[str] = field(default_factory=list)
    numbers: dict[str, float] = field(default_factory=dict)


class Findings:
    """The lines so far. What several jobs have in common is one line."""

    def __init__(self) -> None:
        self.lines: list[Line] = []

    def add(
        self,
        check: str,
        verdict: str,
        found: str,
        todo: str = "",
        *,
        job: str = "",
        **numbers: float,
    ) -> None:
        """Add a line, or to one that says the same the name of another job."""
        for line in self.lines:
            if (line.check, line.verdict, line.found) == (check, verdict, found):
                line.jobs += [job] if job and job not in line.jobs else []
                return
        self.lines.append(Line(check, verdict, found, todo, [job] if job else [], numbers))

    @contextmanager
    def attempt(self, check: str, job: str = "") -> Iterator[None]:
        """What is raised within the block is a line, and the check goes on."""
        try:
            yield
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            todo = "choose smaller sizes, such as features.batch_size, or a larger device"
            self.add(check, FAILS, "the device's memory is too small", todo, job=job)
        except Exception as error:
            said = " ".join(str(error).split()) or "no reason given"
            if not isinstance(error, ConfigError | StoreError):
                said = f"{type(error).__name__}: {said[:300]}"
            self.add(check, FAILS, said, job=job)

    @property
    def verdict(self) -> str:
        """The worst of all."""
        return max((line.verdict for line in self.lines), key=list(COLOURS).index, default=OK)

    def show(self, as_json: bool) -> None:
        """Print all lines as one table, or as one JSON object."""
        if as_json:
            lines = [asdict(line) for line in self.lines]
            print(json.dumps({"verdict": self.verdict, "lines": lines}, indent=2))
            return
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
        for heading, ratio in (("check", None), ("verdict", None), ("found", 3), ("to do", 2)):
            table.add_column(heading, overflow="fold", ratio=ratio)
        for line in self.lines:
            verdict = f"[{COLOURS[line.verdict]}]{line.verdict}[/]"
            table.add_row(
                line.check, verdict, escape(f"{_of(line.jobs)}{line.found}"), escape(line.todo)
            )
        terminal(140).print(table)
        counts = [f"{sum(line.verdict == v for line in self.lines)} {v}" for v in COLOURS]
        print(", ".join(counts))


def _of(jobs: list[str]) -> str:
    """The jobs that a line is about, before what it says."""
    named = ", ".join(jobs[:NAMED])
    more = f" and {len(jobs) - NAMED} more" if len(jobs) > NAMED else ""
    return f"{named}{more}: " if jobs else ""

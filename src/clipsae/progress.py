"""How far long work is: a bar in a terminal, elsewhere a line now and then."""

import logging
import time
from collections.abc import Callable
from types import TracebackType
from typing import ClassVar

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column

log = logging.getLogger(__name__)

SECONDS_BETWEEN_LINES = 30.0


class Bar:
    """One piece of work. Where several go on at the same time, their bars lie one below the other.

    Args:
        name: what is being done, such as "evaluating topk k=16".
        report: told the same, such as `Stage.progress`; what it raises ends the work.
    """

    display: ClassVar[Progress | None] = None  # a terminal has place for one

    def __init__(self, name: str, report: Callable[[int, int], None] | None = None) -> None:
        self.name = name
        self.report = report
        self._shown: Progress | None = None
        self._task = None
        self._last_line = time.monotonic()

    def __call__(self, done: int, total: int, numbers: str | None = None) -> None:
        """Say how far it is.

        Args:
            done, total: steps, images or whatever is counted.
            numbers: what one watches meanwhile; None: as it was.
        """
        if self.report is not None:
            self.report(done, total)
        if self._shown is None:
            self._begin(done, total)
        fields = {} if numbers is None else {"numbers": numbers}
        self._shown.update(self._task, completed=done, total=total, **fields)
        if self._shown.console.is_terminal:
            return
        now = time.monotonic()
        if now - self._last_line > SECONDS_BETWEEN_LINES:
            self._last_line = now
            said = self._shown.tasks[self._shown.task_ids.index(self._task)].fields["numbers"]
            log.info("%s: %d of %d  %s", self.name, done, total, said)

    def _begin(self, done: int, total: int) -> None:
        self._shown = Bar.display or Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            # Where a terminal is narrow, the numbers are cut off and nothing else.
            TextColumn("{task.fields[numbers]}", table_column=Column(ratio=1, no_wrap=True)),
            refresh_per_second=4,
            expand=True,
        )
        Bar.display = self._shown
        self._task = self._shown.add_task(self.name, total=total, completed=done, numbers="")
        if self._shown.console.is_terminal:
            self._shown.start()

    def close(self) -> None:
        """The work is over, or has failed."""
        if self._shown is None:
            return
        self._shown.stop_task(self._task)
        if all(task.stop_time is not None for task in self._shown.tasks):
            if self._shown.console.is_terminal:
                self._shown.stop()
            Bar.display = None
        self._shown = None

    def __enter__(self) -> "Bar":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

"""How far long work is: a bar in a terminal, elsewhere a line now and then."""

import logging
import time
from collections.abc import Callable
from typing import Any, ClassVar

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column

log = logging.getLogger(__name__)

SECONDS_BETWEEN_LINES = 30.0


class Bar:
    """One piece of work. Bars of several that run at the same time are shown below each other.

    Args:
        name: what is being done, such as "evaluating topk k=16".
        report: also called with (done, total), such as `Stage.progress`; what it raises ends the
            work.
    """

    display: ClassVar[Progress | None] = None  # shared: a terminal has room for one

    def __init__(self, name: str, report: Callable[[int, int], None] | None = None) -> None:
        self.name = name
        self.report = report
        self._shown: Progress | None = None
        self._task: Any = None
        self._numbers = ""
        self._last_line = time.monotonic()

    def __call__(self, done: int, total: int, numbers: str | None = None) -> None:
        """Show how far it is.

        Args:
            done, total: steps, images, ...
            numbers: metrics to show beside it; None: as before.
        """
        if self.report is not None:
            self.report(done, total)
        shown = self._shown or self._begin(done, total)
        self._numbers = self._numbers if numbers is None else numbers
        shown.update(self._task, completed=done, total=total, numbers=self._numbers)
        now = time.monotonic()
        late = now - self._last_line > SECONDS_BETWEEN_LINES
        if late and not shown.console.is_terminal:
            self._last_line = now
            log.info("%s: %d of %d  %s", self.name, done, total, self._numbers)

    def _begin(self, done: int, total: int) -> Progress:
        self._shown = Bar.display = Bar.display or Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            # In a narrow terminal only the numbers are cut off.
            TextColumn("{task.fields[numbers]}", table_column=Column(ratio=1, no_wrap=True)),
            refresh_per_second=4,
            expand=True,
        )
        self._task = self._shown.add_task(self.name, total=total, completed=done, numbers="")
        if self._shown.console.is_terminal:
            self._shown.start()
        return self._shown

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

    def __exit__(self, *error: object) -> None:
        self.close()

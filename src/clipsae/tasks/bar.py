"""A bar over a phase of a task that may take longer than some seconds."""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)

log = logging.getLogger(__name__)

SECONDS_BETWEEN_LINES = 30.0


@contextmanager
def bar(what: str) -> Iterator[Callable[[int, int], None]]:
    """A bar within the block, gone after it; where there is no terminal, a line every now and then.

    Args:
        what: is being done.

    Yields:
        What to call with (done, in all).
    """
    shown = Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        refresh_per_second=4,
        transient=True,
    )
    terminal, last = shown.console.is_terminal, time.monotonic()
    task = shown.add_task(what, total=None)

    def progress(done: int, total: int) -> None:
        nonlocal last
        shown.update(task, completed=done, total=total)
        if not terminal and time.monotonic() - last > SECONDS_BETWEEN_LINES:
            last = time.monotonic()
            log.info("%s: %s of %s", what, f"{done:,}", f"{total:,}")

    if terminal:
        shown.start()
    try:
        yield progress
    finally:
        shown.stop()

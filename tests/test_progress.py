"""A bar in a terminal; elsewhere a line now and then."""

import io
import logging

import pytest
from rich.console import Console

from clipsae import progress
from clipsae.progress import Bar


@pytest.fixture
def screen(monkeypatch):
    """A terminal, and what is on it."""
    written = io.StringIO()
    console = Console(file=written, force_terminal=True, width=100)
    monkeypatch.setattr("rich.progress.get_console", lambda: console)
    return written


def test_a_terminal_shows_bars_one_below_the_other(screen):
    with Bar("evaluating topk") as first, Bar("evaluating relu") as second:
        first(3, 8)
        second(0, 8, "fvu 0.1")
        first(8, 8)
        second(8, 8)
    assert Bar.display is None
    for text in ("evaluating topk", "evaluating relu", "8/8", "fvu 0.1"):
        assert text in screen.getvalue()


def test_elsewhere_it_is_a_line_now_and_then(caplog, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    with caplog.at_level(logging.INFO, logger="clipsae"), Bar("measuring topk") as bar:
        for done in range(1, 11):
            now[0] += 10
            bar(done, 10, f"fvu {done}")
    lines = [record.message.strip() for record in caplog.records]
    assert lines == ["measuring topk: 4 of 10  fvu 4", "measuring topk: 8 of 10  fvu 8"]
    assert Bar.display is None


def test_what_is_told_may_end_the_work():
    def lost(done: int, total: int) -> None:
        raise RuntimeError("taken over")

    with pytest.raises(RuntimeError, match="taken over"), Bar("evaluating", lost) as bar:
        bar(1, 2)
    assert Bar.display is None

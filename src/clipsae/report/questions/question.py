"""A question of the page with its answer, and how figures are written in it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache

import pandas as pd

from clipsae.evaluation.metrics import NUMBERS
from clipsae.evaluation.numbers import Number
from clipsae.report.plots import Plot
from clipsae.report.questions.statistics import Interval
from clipsae.report.table import MINUS

NOISE = "the 95 % interval (Welch) of the difference of the means over seeds contains 0"


@dataclass(frozen=True)
class Table:
    """Texts, a row a line."""

    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Question:
    """A section of the page.

    Attributes:
        title: the question.
        grids: of `sweeps/findings.yaml` whose cells answer it.
        answer: sentences computed from the results; empty: the results do not answer it.
        limits: what it does not show.
        used: the figures that it rests on.
    """

    title: str
    grids: Sequence[str]
    answer: Sequence[str] = ()
    tables: Sequence[Table] = ()
    plots: Sequence[Plot] = ()
    limits: Sequence[str] = ()
    used: pd.DataFrame = field(default_factory=pd.DataFrame)


@cache
def measures() -> tuple[Number, ...]:
    """The numbers that say which of two SAEs is better: no floors and ceilings of others."""
    beside = {key for number in NUMBERS for key in (number.floor, number.ceiling)}
    kept = [n for n in NUMBERS if n.better and n.table and n.key not in beside]
    # How sparse an SAE is, is set by its recipe.
    return tuple(n for n in kept if not n.key.endswith("_dense") and n.key != "zero_fraction")


def accuracy(key: str) -> Number:
    """The record of an accuracy in percent."""
    return Number(key, key, format=".1f")


def number_of(key: str) -> Number:
    """The record of a figure."""
    return next((number for number in NUMBERS if number.key == key), accuracy(key))


def figure(value: float, form: str = ".2f") -> str:
    """A figure with a real minus; "" where it is undefined."""
    if math.isnan(value):
        return ""
    text = f"{value:{form}}"
    if not text.strip("-0.%"):
        text = text.removeprefix("-")
    return text.replace("%", " %").replace("-", MINUS)


def interval(found: Interval, form: str = ".2f") -> str:
    """A mean ± half its interval; the mean alone where that is not known."""
    text = figure(found.value, form)
    if not text or math.isnan(found.half):
        return text
    return f"{text} ± {figure(found.half, form).removesuffix(' %')}"


def bounds(found: Interval, form: str = ".2f") -> str:
    """A figure with its bounds."""
    if math.isnan(found.low):
        return figure(found.value, form)
    return f"{figure(found.value, form)} [{figure(found.low, form)}, {figure(found.high, form)}]"


def counted(n: int, what: str) -> str:
    """Such as "1 seed", "2 seeds"."""
    return f"{n:,} {what}" + ("s" if n != 1 else "")

"""Intervals and tests over seeds: Student's t, Welch and Fisher's z, all at 95 %."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from clipsae.report.noise import LEVEL, welch_half


@dataclass(frozen=True)
class Interval:
    """A figure and its 95 % interval; bounds are NaN where it is not known (one value).

    Attributes:
        n: values that it rests on.
    """

    value: float
    low: float
    high: float
    n: int

    @property
    def half(self) -> float:
        """Half its width; NaN where it is not known."""
        return (self.high - self.low) / 2

    @property
    def bar(self) -> float:
        """Half its width as an error bar: 0 where it is not known."""
        return 0.0 if math.isnan(self.half) else self.half

    @property
    def sign(self) -> int:
        """1 or -1 where the whole interval lies above or below 0, else 0."""
        return int(self.low > 0) - int(self.high < 0)


def mean(values: Sequence[float]) -> Interval:
    """The mean with Student's t interval, mean ± t(n - 1) sd / sqrt(n); NaN is left out."""
    x = np.asarray([v for v in values if not math.isnan(v)], dtype=float)
    if len(x) == 0:
        return Interval(*[math.nan] * 3, 0)
    middle = float(x.mean())
    if len(x) == 1:
        return Interval(middle, math.nan, math.nan, 1)
    half = stats.t.ppf((1 + LEVEL) / 2, len(x) - 1) * x.std(ddof=1) / math.sqrt(len(x))
    return Interval(middle, middle - half, middle + half, len(x))


def mean_correlation(values: Sequence[float]) -> Interval:
    """The mean of correlations by Fisher's z, tanh of the mean of artanh r, and its t interval.

    z is infinite where r is 1 or -1: with one of those it is the mean of r itself, its t interval
    cut at -1 and 1. NaN is left out.
    """
    known = [min(max(v, -1.0), 1.0) for v in values if not math.isnan(v)]  # rounding
    if any(abs(r) > 1 - 1e-12 for r in known):
        found = mean(known)
        low, high = max(found.low, -1.0), min(found.high, 1.0)  # (NaN, being first, stays)
        return Interval(found.value, low, high, found.n)
    found = mean([math.atanh(r) for r in known])
    return Interval(*(math.tanh(v) for v in (found.value, found.low, found.high)), found.n)


def difference(a: Sequence[float], b: Sequence[float]) -> Interval:
    """mean(a) - mean(b) with Welch's interval; n is the smaller number of values.

    Without two values on each side there is no interval. Where neither side varies at all the
    interval is the difference itself.
    """
    x, y = (np.asarray([v for v in side if not math.isnan(v)], dtype=float) for side in (a, b))
    n = min(len(x), len(y))
    if n == 0:
        return Interval(*[math.nan] * 3, 0)
    middle = float(x.mean() - y.mean())
    if abs(middle) <= 1e-12 * max(abs(x).max(), abs(y).max()):
        middle = 0.0  # rounding
    if n == 1:
        return Interval(middle, math.nan, math.nan, 1)
    of_x, of_y = x.var(ddof=1) / len(x), y.var(ddof=1) / len(y)
    if of_x + of_y == 0:
        return Interval(middle, middle, middle, n)
    half = welch_half(float(of_x), len(x), float(of_y), len(y))
    return Interval(middle, middle - half, middle + half, n)


def correlation(a: Sequence[float], b: Sequence[float]) -> Interval:
    """Pearson's correlation with Fisher's interval, tanh(artanh r ± 1.96 / sqrt(n - 3)).

    NaN where one of them is constant or there are fewer than 3 pairs; without bounds below 4.
    """
    pairs = [(x, y) for x, y in zip(a, b, strict=True) if not (math.isnan(x) or math.isnan(y))]
    n = len(pairs)
    x, y = np.asarray(pairs, dtype=float).reshape(n, 2).T
    if n < 3 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return Interval(*[math.nan] * 3, n)
    r = float(np.clip(np.corrcoef(x, y)[0, 1], -1, 1))
    if n < 4 or abs(r) == 1:
        return Interval(r, math.nan, math.nan, n)
    half = stats.norm.ppf((1 + LEVEL) / 2) / math.sqrt(n - 3)
    return Interval(r, *(math.tanh(math.atanh(r) + side * half) for side in (-1, 1)), n)


def agreement(a: Sequence[float], b: Sequence[float]) -> float:
    """Kendall's tau-b of two orders of the same things; NaN below two of them or for ties alone."""
    return float(stats.kendalltau(a, b).statistic) if len(a) > 1 else math.nan

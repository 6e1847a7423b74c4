"""What differs by more than chance: two means over seeds, a measure's variants against its seeds.

A line's values are those of several trainings that differ in the seed alone.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

LEVEL = 0.95
RULE = (
    "two means over seeds are told apart if the two-sided 95 % interval of their difference by "
    "Welch (unequal variances) does not contain 0, each comparison by itself"
)


def welch_half(of_a: float, n_a: int, of_b: float, n_b: int) -> float:
    """Half the interval of a difference of two means (Welch, 1947): t(nu) sqrt(of_a + of_b), with

        nu = (of_a + of_b)^2 / (of_a^2 / (n_a - 1) + of_b^2 / (n_b - 1)).

    Args:
        of_a, of_b: variances of the means, sd^2 / n; not both 0.
        n_a, n_b: values that they rest on, at least 2.
    """
    freedom = (of_a + of_b) ** 2 / (of_a**2 / (n_a - 1) + of_b**2 / (n_b - 1))
    return float(stats.t.ppf((1 + LEVEL) / 2, freedom) * math.sqrt(of_a + of_b))


def told_apart(
    first: tuple[float, float | None, int], second: tuple[float, float | None, int]
) -> bool | None:
    """Whether two means over seeds differ by more than the noise of the seeds (Welch, 1947).

    Args:
        first, second: mean, standard deviation (n - 1) and number of seeds n.

    Returns:
        None: it cannot be known, as one of them has fewer than two seeds. Two that do not vary at
        all are told apart if they are not the same number.
    """
    (a, sd_a, n_a), (b, sd_b, n_b) = first, second
    if sd_a is None or sd_b is None or min(n_a, n_b) < 2:
        return None
    of_a, of_b = sd_a**2 / n_a, sd_b**2 / n_b
    if math.sqrt(of_a + of_b) <= 1e-12 * max(abs(a), abs(b)):
        return not math.isclose(a, b, rel_tol=1e-12)
    return abs(a - b) > welch_half(of_a, n_a, of_b, n_b)


@dataclass(frozen=True)
class Reliability:
    """How well a measure tells variants apart, against the noise of its seeds.

    Attributes:
        within: standard deviation over seeds, pooled over variants.
        between: standard deviation of the variants' means.
        ratio: within / between.
        icc: intraclass correlation, the share of the variance that lies between variants.
        low, high: its interval.
        tells: whether the variants' means differ by more than chance (F test).
        variants, seeds: how many variants, and values of all of them.
    """

    within: float
    between: float
    ratio: float
    icc: float
    low: float
    high: float
    tells: bool
    variants: int
    seeds: int


def reliability(groups: Sequence[Sequence[float]]) -> Reliability | None:
    """One-way random-effects analysis of variance: ICC(1) of Shrout and Fleiss (1979) with its 95 %
    interval and the F test of equal means.

        ICC = (MSB - MSW) / (MSB + (k - 1) MSW)

    MSB and MSW are the mean squares between and within variants, k the seeds of a variant; where
    their numbers differ, k is (N - sum n_i^2 / N) / (a - 1) of a variants with N values in all
    (exact for equal numbers, else an approximation). A measure that is all noise has an ICC of
    about 0, or below; one that seeds do not change has 1.

    Args:
        groups: the values of each variant's seeds; those with fewer than two are left out.

    Returns:
        None: fewer than two variants with two seeds, or a measure that never varies.
    """
    groups = [np.asarray(g, dtype=np.float64) for g in groups if len(g) > 1]
    if len(groups) < 2:
        return None
    a, sizes = len(groups), np.array([len(g) for g in groups])
    n = int(sizes.sum())
    means = np.array([g.mean() for g in groups])
    grand = float((sizes * means).sum() / n)
    msb = float((sizes * (means - grand) ** 2).sum() / (a - 1))
    msw = float(sum(((g - m) ** 2).sum() for g, m in zip(groups, means, strict=True)) / (n - a))
    tiny = (1e-12 * max(float(np.abs(g).max()) for g in groups)) ** 2  # rounding
    msb, msw = (0.0 if square <= tiny else square for square in (msb, msw))
    if not msb and not msw:
        return None
    k = (n - (sizes**2).sum() / n) / (a - 1)
    within, between = math.sqrt(msw), float(means.std(ddof=1)) if msb else 0.0
    ratio = within / between if between else math.inf
    if not msw:
        return Reliability(within, between, ratio, 1.0, 1.0, 1.0, True, a, n)
    f, tail = msb / msw, (1 + LEVEL) / 2
    low = f / stats.f.ppf(tail, a - 1, n - a)
    high = f * stats.f.ppf(tail, n - a, a - 1)
    icc, low, high = (float((x - 1) / (x + k - 1)) for x in (f, low, high))
    tells = bool(f > stats.f.ppf(LEVEL, a - 1, n - a))
    return Reliability(within, between, ratio, icc, low, high, tells, a, n)

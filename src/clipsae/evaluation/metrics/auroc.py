"""AUROC and best F1 of every latent for every concept at once, exact, from sparse codes.

AUROC by mid-ranks (Mann and Whitney 1947), so that ties count one half:

    AUROC_mv = (sum_{i: v} rank_m(i) - P (P + 1) / 2) / (P (N - P)),   P = positives of v.

The zeros of a latent are one tie with one mid-rank r0, so that the sum of ranks is r0 P and a
sparse product of (rank - r0) with the truth: the work is that of the codes that are not zero.

N rows (patches or images), M latents, m latents of a block, V concepts.
"""

from bisect import bisect_right
from collections.abc import Iterator

import torch
from torch import Tensor

from clipsae.sae import SparseCodes
from clipsae.sae.codes import csr

ROUNDING = 1e-18  # of a sum of squares: less about the mean is that of a constant


def latent_blocks(
    codes: SparseCodes, pairs: int, latents: int
) -> Iterator[tuple[int, SparseCodes]]:
    """Codes [N, M] of consecutive latents with at most so many pairs and latents (but one latent
    always), sorted by latent and value as `auroc` and `best_f1` need them.

    Yields:
        The first latent's index, and its block's codes [N, m].
    """
    codes = codes.by_latent()
    edges = codes.latent_edges().tolist()
    first = 0
    while first < codes.latents:
        fitting = bisect_right(edges, edges[first] + pairs) - 1
        last = max(first + 1, min(fitting, first + latents, codes.latents))
        block, m = slice(edges[first], edges[last]), last - first
        positions = codes.token[block] * m + codes.latent[block] - first
        yield first, SparseCodes(codes.values[block], positions, (codes.tokens, m))
        first = last


def sum_rows(codes: SparseCodes, values: Tensor, truth: Tensor) -> Tensor:
    """Sum of the pairs' values over the rows of each concept: [p], [N, V] -> [m, V]."""
    # Rows are not ascending within a latent; the product does not need them to be.
    return csr(codes.latent_edges(), codes.token, values, codes.tokens) @ truth


def auroc(codes: SparseCodes, truth: Tensor) -> Tensor:
    """AUROC of each latent's code as a score for each concept.

    Args:
        codes: [N, m], sorted by latent and value.
        truth: float64 [N, V] of 0 and 1.

    Returns:
        float64 [m, V]; 0.5 for a latent that is always the same, NaN for a concept that all rows
        have or none.
    """
    total, edges, latent = codes.tokens, codes.latent_edges(), codes.latent
    sizes = edges.diff()
    zeros = total - sizes
    negative = codes.count(codes.values < 0)
    of_zero = (negative + (zeros + 1) / 2).double()  # ranks count from 1

    first = starts_of_ties(codes)
    tie = first.cumsum(0) - 1
    start = first.nonzero().squeeze(1)
    before = start - edges[latent[start]]  # pairs of the latent below the tie
    before = before + zeros[latent[start]] * (codes.values[start] > 0)
    rank = (before + (torch.bincount(tie) + 1) / 2).double()[tie]

    positives = truth.sum(dim=0)
    ranks = sum_rows(codes, rank - of_zero[latent], truth) + of_zero[:, None] * positives
    # 0/0 is NaN
    return (ranks - positives * (positives + 1) / 2) / (positives * (total - positives))


def best_f1(codes: SparseCodes, truth: Tensor) -> Tensor:
    """The best F1 over thresholds t >= 0 of "the concept is there where code > t".

    The threshold is chosen on these rows. That everything is predicted is no option.

    Args:
        codes: [N, m], sorted by latent and value.
        truth: float64 [N, V] of 0 and 1.

    Returns:
        float64 [m, V]; 0 for a latent without positive codes, NaN for a concept that no row has.
    """
    positives = truth.sum(dim=0)
    best = truth.new_zeros(codes.latents, truth.shape[1])
    # A threshold lies just below the first pair of a tie, and all from there on are predicted.
    start = (starts_of_ties(codes) & (codes.values > 0)).nonzero().squeeze(1)
    if len(start):
        latent = codes.latent[start]
        end = codes.latent_edges()[latent + 1]
        hits = truth[codes.token].cumsum(dim=0)
        hits = torch.cat((hits.new_zeros(1, hits.shape[1]), hits))
        true = hits[end] - hits[start]
        f1 = 2 * true / ((end - start)[:, None] + positives)
        best.scatter_reduce_(0, latent[:, None].expand_as(f1), f1, "amax")
    return torch.where(positives > 0, best, torch.nan)


def correlation(codes: SparseCodes, truth: Tensor) -> Tensor:
    """Pearson's correlation of each latent's code with each concept, over all N rows.

    Args:
        codes: [N, m], sorted by latent.
        truth: float64 [N, V] of 0 and 1.

    Returns:
        float64 [m, V]; 0 for a latent that is always the same and for a concept that all rows have
        or none.
    """
    n = max(codes.tokens, 1)
    values = codes.values.double()
    mean, base = codes.sum_tokens(values) / n, truth.sum(dim=0) / n
    # Sums of squares about the mean: rows that are zero are each mean^2.
    off = values - codes.at_latent(mean)
    zeros = n - codes.latent_edges().diff()
    spread = codes.sum_tokens(off.square()) + zeros * mean.square()
    spread = torch.where(spread > ROUNDING * codes.sum_tokens(values.square()), spread, 0)
    covariance = sum_rows(codes, values, truth) - mean[:, None] * base * n
    norms = (spread[:, None] * (n * base * (1 - base))).sqrt()
    return torch.where(norms > 0, covariance / norms, 0)


def column_correlation(scores: Tensor, truth: Tensor) -> Tensor:
    """`correlation` of each column with its own: [N, V], BoolTensor [N, V] -> float64 [V]."""
    scores, truth = scores.double(), truth.double()
    squares = scores.square().sum(dim=0)
    scores, truth = scores - scores.mean(dim=0), truth - truth.mean(dim=0)
    spread = scores.square().sum(dim=0)
    spread = torch.where(spread > ROUNDING * squares, spread, 0)
    norms = (spread * truth.square().sum(dim=0)).sqrt()
    return torch.where(norms > 0, (scores * truth).sum(dim=0) / norms, 0)


def f1_threshold(scores: Tensor, truth: Tensor) -> Tensor:
    """The t > 0 whose "score >= t" has the largest F1, the largest t of equals.

    Args:
        scores: [N, V], a column for each concept.
        truth: BoolTensor [N, V].

    Returns:
        float64 [V]; infinity (nothing is predicted) where no score is positive.
    """
    scores, order = scores.double().sort(dim=0, descending=True, stable=True)
    true = truth.gather(0, order).double().cumsum(dim=0)
    said = torch.arange(1, len(scores) + 1, device=scores.device)[:, None]
    f1 = 2 * true / (said + truth.sum(dim=0))
    last = torch.ones_like(truth)  # of equal scores: all or none are predicted
    last[:-1] = scores[1:] != scores[:-1]
    f1 = torch.where(last & (scores > 0), f1, -1)
    best, at = f1.max(dim=0)  # `max` may return any of equals
    at = (f1 == best).double().argmax(dim=0)
    return torch.where(best >= 0, scores.gather(0, at[None])[0], torch.inf)


def f1_above(scores: Tensor, truth: Tensor, thresholds: Tensor) -> Tensor:
    """F1 of "score >= threshold": [N, V], BoolTensor [N, V], [V] -> float64 [V]; NaN for a concept
    that no row has."""
    said = scores.double() >= thresholds
    hits, positives = (said & truth).sum(dim=0).double(), truth.sum(dim=0)
    return torch.where(positives > 0, 2 * hits / (said.sum(dim=0) + positives), torch.nan)


def starts_of_ties(codes: SparseCodes) -> Tensor:
    """Where a latent's run of equal values begins, BoolTensor [p]."""
    first = torch.ones_like(codes.positions, dtype=torch.bool)
    first[1:] = (codes.latent.diff() != 0) | (codes.values.diff() != 0)
    return first

"""AUROC and best F1 of every latent for every concept at once, exact, from sparse codes.

AUROC by mid-ranks (Mann and Whitney 1947), so that ties count one half:

    AUROC_mv = (sum_{i: v} rank_m(i) - P (P + 1) / 2) / (P (N - P)),   P = positives of v.

The zeros of a latent are one tie with one mid-rank r0, so that the sum of ranks is r0 P and a
sparse product of (rank - r0) with the truth: the work is that of the codes that are not zero.

N rows (patches or images), M latents, m latents of a block, V concepts.
"""

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from clipsae.evaluation.metrics.rows import SparseRows, csr


@dataclass(frozen=True)
class LatentEntries:
    """Codes that are not zero, latent by latent, ascending in value.

    Attributes:
        edges: LongTensor [m + 1], where each latent's entries begin and end.
        rows: LongTensor [nnz].
        values: float32 [nnz].
        total: N, zeros included.
    """

    edges: Tensor
    rows: Tensor
    values: Tensor
    total: int

    @classmethod
    def of(cls, codes: SparseRows) -> "LatentEntries":
        """All latents of a sample."""
        by_value = codes.values.argsort(stable=True)
        order = by_value[codes.columns[by_value].argsort(stable=True)]
        counts = torch.bincount(codes.columns, minlength=codes.width)
        edges = torch.cat((counts.new_zeros(1), counts.cumsum(0)))
        return cls(edges, codes.rows()[order], codes.values[order], len(codes))

    def __len__(self) -> int:
        return len(self.edges) - 1

    @property
    def latents(self) -> Tensor:
        """The latent of each entry, LongTensor [nnz]."""
        return torch.repeat_interleave(self.edges.diff())

    def blocks(self, entries: int, latents: int) -> Iterator[tuple[int, "LatentEntries"]]:
        """Consecutive latents with at most that many entries and latents (but one latent always).

        Yields:
            The first latent's index, and the block.
        """
        edges = self.edges.tolist()
        first = 0
        while first < len(self):
            fitting = bisect_right(edges, edges[first] + entries) - 1
            last = max(first + 1, min(fitting, first + latents, len(self)))
            of = slice(edges[first], edges[last])
            block = self.edges[first : last + 1] - edges[first]
            yield first, LatentEntries(block, self.rows[of], self.values[of], self.total)
            first = last

    def times(self, values: Tensor, truth: Tensor) -> Tensor:
        """Sum of an entry's value over the rows of each concept: [nnz], [N, V] -> [m, V]."""
        # Rows are not ascending within a latent; the product does not need them to be.
        return csr(self.edges, self.rows, values, self.total) @ truth


def auroc(entries: LatentEntries, truth: Tensor) -> Tensor:
    """AUROC of each latent's code as a score for each concept.

    Args:
        truth: float64 [N, V] of 0 and 1.

    Returns:
        float64 [m, V]; 0.5 for a latent that is always the same, NaN for a concept that all rows
        have or none.
    """
    latents, sizes = entries.latents, entries.edges.diff()
    zeros = entries.total - sizes
    negative = torch.zeros_like(sizes).index_add(0, latents, (entries.values < 0).long())
    of_zero = (negative + (zeros + 1) / 2).double()  # ranks count from 1

    first = _starts_of_ties(entries)
    tie = first.cumsum(0) - 1
    start = first.nonzero().squeeze(1)
    before = start - entries.edges[latents[start]]  # entries of the latent below the tie
    before = before + zeros[latents[start]] * (entries.values[start] > 0)
    rank = (before + (torch.bincount(tie) + 1) / 2).double()[tie]

    positives = truth.sum(dim=0)
    ranks = entries.times(rank - of_zero[latents], truth) + of_zero[:, None] * positives
    # 0/0 is NaN
    return (ranks - positives * (positives + 1) / 2) / (positives * (entries.total - positives))


def best_f1(entries: LatentEntries, truth: Tensor) -> Tensor:
    """The best F1 over thresholds t >= 0 of "the concept is there where code > t".

    The threshold is chosen on these rows. That everything is predicted is no option.

    Args:
        truth: float64 [N, V] of 0 and 1.

    Returns:
        float64 [m, V]; 0 for a latent without positive codes, NaN for a concept that no row has.
    """
    positives = truth.sum(dim=0)
    best = truth.new_zeros(len(entries), truth.shape[1])
    # A threshold lies just below the first entry of a tie, and all from there on are predicted.
    start = (_starts_of_ties(entries) & (entries.values > 0)).nonzero().squeeze(1)
    if len(start):
        latents = entries.latents[start]
        end = entries.edges[latents + 1]
        hits = truth[entries.rows].cumsum(dim=0)
        hits = torch.cat((hits.new_zeros(1, hits.shape[1]), hits))
        true = hits[end] - hits[start]
        f1 = 2 * true / ((end - start)[:, None] + positives)
        best.scatter_reduce_(0, latents[:, None].expand_as(f1), f1, "amax")
    return torch.where(positives > 0, best, torch.nan)


def _starts_of_ties(entries: LatentEntries) -> Tensor:
    """Where a latent's run of equal values begins, BoolTensor [nnz]."""
    first = torch.ones_like(entries.rows, dtype=torch.bool)
    latents = entries.latents
    first[1:] = (latents.diff() != 0) | (entries.values.diff() != 0)
    return first

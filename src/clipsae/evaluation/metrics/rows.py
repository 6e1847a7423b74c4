"""A sample of codes held sparse: what the metrics keep that need the codes themselves.

N rows (tokens, patches or images), M latents.
"""

import logging
import random
import warnings
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torchmetrics.utilities import dim_zero_cat

from clipsae.evaluation.metrics.base import Measurement, Options
from clipsae.sae import SAE

log = logging.getLogger(__name__)

Progress = Callable[[int, int], None]
"""Called with (done, in all)."""


@dataclass(frozen=True)
class SparseRows:
    """Codes [N, M] without their zeros, row by row.

    Attributes:
        counts: LongTensor [N], entries of each row.
        columns: LongTensor [nnz], their latents, ascending within a row.
        values: float32 [nnz]; negative ones are possible.
        width: M.
    """

    counts: Tensor
    columns: Tensor
    values: Tensor
    width: int

    @classmethod
    def from_dense(cls, codes: Tensor) -> "SparseRows":
        """From codes [..., M] of any float dtype; what is not float32 is made so."""
        codes = codes.detach().reshape(-1, codes.shape[-1])
        rows, columns = codes.nonzero(as_tuple=True)
        counts = torch.bincount(rows, minlength=len(codes))
        return cls(counts, columns, codes[rows, columns].float(), codes.shape[-1])

    def __len__(self) -> int:
        return len(self.counts)

    def __getitem__(self, rows: slice) -> "SparseRows":
        """Consecutive rows."""
        start, stop, _ = rows.indices(len(self))
        edges = self._edges()
        entries = slice(int(edges[start]), int(edges[stop]))
        return SparseRows(
            self.counts[start:stop], self.columns[entries], self.values[entries], self.width
        )

    def permuted(self, order: Tensor) -> "SparseRows":
        """The rows LongTensor [n], in that order."""
        counts = self.counts[order]
        first = torch.repeat_interleave(self._edges()[order] - counts.cumsum(0) + counts, counts)
        entries = first + torch.arange(len(first), device=first.device)
        return SparseRows(counts, self.columns[entries], self.values[entries], self.width)

    def dense(self) -> Tensor:
        """float64 [N, M]."""
        out = self.values.new_zeros(len(self), self.width, dtype=torch.float64)
        out[self.rows(), self.columns] = self.values.double()
        return out

    def rows(self) -> Tensor:
        """The row of each entry, LongTensor [nnz]."""
        return torch.repeat_interleave(self.counts)

    def csr(self) -> Tensor:
        """A sparse CSR matrix [N, M] in float64."""
        return csr(self._edges(), self.columns, self.values.double(), self.width)

    def _edges(self) -> Tensor:
        return torch.cat((self.counts.new_zeros(1), self.counts.cumsum(0)))


def csr(edges: Tensor, columns: Tensor, values: Tensor, width: int) -> Tensor:
    """A sparse CSR matrix [R, width] whose row r holds the entries edges[r] .. edges[r + 1]."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
        # Columns need not ascend within a row for products; checking them would cost a pass.
        return torch.sparse_csr_tensor(
            edges, columns, values, (len(edges) - 1, width), check_invariants=False
        )


class SampledCodes(Measurement):
    """Base of the measurements that keep rows of codes and something beside each of them.

    Each row has a number, by which rows are put in order: that in which they come does not matter.
    Memory grows with the rows that are given, 12 bytes for each code that is not zero, up to a
    bound: where `too_much` says so, every second row is dropped, and of those that follow, too,
    by what is drawn for each from its number alone. The states are gathered from all processes, so
    that the result, unless rows were dropped, is that of one process that saw all.

    Args:
        beside: columns of what is kept beside each row.
        dtype: its type.

    Attributes:
        what: what a row is, for the log.
        compared: after `compute`, how many rows it rests on; None where that is all.
    """

    what = "rows"
    compared: int | None = None
    halvings: Tensor
    seen: Tensor
    numbers: list[Tensor]
    beside: list[Tensor]
    counts: list[Tensor]
    columns: list[Tensor]
    values: list[Tensor]

    def __init__(self, sae: SAE, options: Options, beside: int, dtype: torch.dtype) -> None:
        super().__init__(sae, options)
        self._empty = {
            "beside": torch.empty(0, beside, dtype=dtype),
            "counts": torch.empty(0, dtype=torch.long),
            "columns": torch.empty(0, dtype=torch.long),
            "values": torch.empty(0),
            "numbers": torch.empty(0, dtype=torch.long),
        }
        for name in self._empty:
            self.add_state(name, [], dist_reduce_fx="cat")
        self.add_state("seen", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")
        self.add_state("halvings", torch.zeros((), dtype=torch.long), dist_reduce_fx="max")
        self._start()

    def reset(self) -> None:
        super().reset()
        self._start()

    def too_much(self, rows: int, entries: int) -> bool:
        """Whether so many rows with so many codes that are not zero are more than can be held, or
        compared in a bearable time."""
        return False

    def _start(self) -> None:
        # A process without rows still takes part in the gathering, with the right shapes.
        for name, empty in self._empty.items():
            setattr(self, name, [empty.to(self.device)])

    def _add(self, numbers: Tensor, beside: Tensor, codes: Tensor) -> None:
        """Keep rows: their numbers [n], beside [n, ...] and dense codes [n, M]."""
        self.seen += len(codes)
        kept = _hash(numbers) < 2**31 >> int(self.halvings)
        if not kept.all():
            numbers, beside, codes = numbers[kept], beside[kept], codes[kept]
        rows = SparseRows.from_dense(codes)
        self.numbers.append(numbers)
        self.beside.append(beside.detach().to(self._empty["beside"].dtype))
        self.counts.append(rows.counts)
        self.columns.append(rows.columns)
        self.values.append(rows.values)
        while self._is_too_much():
            self.halvings += 1
            numbers, beside, rows = self._rows()
            self.numbers, self.beside, self.counts = [numbers], [beside], [rows.counts]
            self.columns, self.values = [rows.columns], [rows.values]

    def _is_too_much(self) -> bool:
        rows = sum(map(len, self.counts))
        return rows > 1 and self.too_much(rows, sum(map(len, self.columns)))

    def _rows(self) -> tuple[Tensor, Tensor, SparseRows]:
        """All that is kept, by number: numbers, beside and codes; after a reduction that is of all
        processes."""
        numbers, beside = dim_zero_cat(self.numbers), dim_zero_cat(self.beside)
        codes = SparseRows(
            dim_zero_cat(self.counts),
            dim_zero_cat(self.columns),
            dim_zero_cat(self.values),
            self.latents,
        )
        order = numbers.argsort()
        order = order[_hash(numbers[order]) < 2**31 >> int(self.halvings)]
        return numbers[order], beside[order], codes.permuted(order)

    def _note(self, codes: SparseRows) -> None:
        """Where rows were dropped: how many are left, in the log and for whoever asks."""
        if self.halvings:
            self.compared = len(codes)
            log.info(
                "%s compares %s of %s %s, drawn at random: with %s active latents each, all would "
                "take too long",
                type(self).__name__,
                f"{len(codes):,}",
                f"{int(self.seen):,}",
                self.what,
                f"{len(codes.values) / max(1, len(codes)):,.0f}",
            )


class Sample:
    """Which of all rows are drawn, those of an image side by side.

    Args:
        images: N.
        each: rows of an image.
        size: how many are drawn; all where there are no more.
    """

    def __init__(self, images: int, each: int, size: int, seed: int) -> None:
        self.each = each
        self.drawn = sorted(random.Random(seed).sample(range(n := images * each), min(size, n)))

    def among(self, positions: list[int]) -> tuple[list[int], list[int]]:
        """Of the rows of some images those that are drawn, and their numbers among all drawn."""
        rows: list[int] = []
        numbers: list[int] = []
        for i, position in enumerate(positions):
            first = position * self.each
            start, stop = (bisect_left(self.drawn, at) for at in (first, first + self.each))
            rows += [i * self.each + at - first for at in self.drawn[start:stop]]
            numbers += range(start, stop)
        return rows, numbers


def _hash(numbers: Tensor) -> Tensor:
    """Of each number one below 2^31 which looks random."""
    x = numbers + 1
    for shift, factor in ((16, 0x45D9F3B), (16, 0x45D9F3B)):  # an integer hash of 32 bits
        x = ((x >> shift) ^ x) * factor & 0xFFFFFFFF
    return ((x >> 16) ^ x) >> 1

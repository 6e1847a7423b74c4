"""A sample of codes held sparse: what the metrics keep that need the codes themselves.

N rows (tokens, patches or images), M latents.
"""

import logging
import random
from bisect import bisect_left
from collections.abc import Callable

import torch
from torch import Tensor
from torchmetrics.utilities import dim_zero_cat

from clipsae.evaluation.metrics.base import Measurement, Options
from clipsae.sae import SAE, SparseCodes

log = logging.getLogger(__name__)

Progress = Callable[[int, int], None]
"""Called with (done, in all)."""


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
    drawn: list[Tensor]
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
            "drawn": torch.empty(0, dtype=torch.long),
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
        rows = SparseCodes.from_dense(codes.float())
        self.drawn.append(numbers)
        self.beside.append(beside.detach().to(self._empty["beside"].dtype))
        self.counts.append(rows.row_counts())
        self.columns.append(rows.latent)
        self.values.append(rows.values)
        while self._is_too_much():
            self.halvings += 1
            numbers, beside, rows = self._rows()
            self.drawn, self.beside, self.counts = [numbers], [beside], [rows.row_counts()]
            self.columns, self.values = [rows.latent], [rows.values]

    def _is_too_much(self) -> bool:
        rows = sum(map(len, self.counts))
        return rows > 1 and self.too_much(rows, sum(map(len, self.columns)))

    def _rows(self) -> tuple[Tensor, Tensor, SparseCodes]:
        """All that is kept, by number: numbers, beside and codes; after a reduction that is of all
        processes."""
        numbers, beside = dim_zero_cat(self.drawn), dim_zero_cat(self.beside)
        counts, columns = dim_zero_cat(self.counts), dim_zero_cat(self.columns)
        order = numbers.argsort()
        order = order[_hash(numbers[order]) < 2**31 >> int(self.halvings)]
        row = torch.full_like(numbers, -1)
        row[order] = torch.arange(len(order), device=order.device)
        row = torch.repeat_interleave(row, counts)
        kept = row >= 0
        positions, ascending = (row[kept] * self.latents + columns[kept]).sort()
        values = dim_zero_cat(self.values)[kept][ascending]
        codes = SparseCodes(values, positions, (len(order), self.latents))
        return numbers[order], beside[order], codes

    def _note(self, codes: SparseCodes) -> None:
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

"""A sample of codes held sparse: what the metrics keep that need the codes themselves.

N rows (tokens, patches or images), M latents.
"""

import logging
from collections.abc import Callable

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from clipsae.sae import SparseCodes

log = logging.getLogger(__name__)

Progress = Callable[[int, int], None]
"""Called with (done, in all)."""


class SampledCodes(Metric):
    """Base of the metrics that keep rows of codes and something beside each of them.

    Memory grows with the rows that are given, 12 bytes for each code that is not zero, up to a
    bound: where `too_much` says so, every second row is dropped, and of those that follow, too,
    by a number that is drawn for each from its position alone. The states are gathered from all
    processes, so that the result, unless rows were dropped, is that of one process that saw all.

    Args:
        latents: M.
        beside: columns of what is kept beside each row.
        dtype: its type.

    Attributes:
        progress: of `compute`, where that takes long.
        what: what a row is, for the log.
        compared: after `compute`, how many rows it rests on; None where that is all.
    """

    full_state_update = False
    progress: Progress | None = None
    what = "rows"
    compared: int | None = None
    halvings: Tensor
    seen: Tensor

    def __init__(self, latents: int, beside: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.latents = latents
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

    def _add(self, beside: Tensor, codes: Tensor) -> None:
        """Keep rows: beside [n, ...] and dense codes [n, M]."""
        if codes.ndim != 2 or codes.shape[1] != self.latents or len(beside) != len(codes):
            raise ValueError(
                f"{len(beside)} rows with codes of shape {tuple(codes.shape)}: expected "
                f"[{len(beside)}, {self.latents}]"
            )
        drawn = _drawn(int(self.seen), len(codes), codes.device)
        self.seen += len(codes)
        if self.halvings:
            kept = drawn < 2**31 >> int(self.halvings)
            beside, codes, drawn = beside[kept], codes[kept], drawn[kept]
        rows = SparseCodes.from_dense(codes.float())
        self.beside.append(beside.detach().to(self._empty["beside"].dtype))
        self.counts.append(rows.row_counts())
        self.columns.append(rows.latent)
        self.values.append(rows.values)
        self.drawn.append(drawn)
        while self._is_too_much():
            self.halvings += 1
            self._keep(*self._rows())

    def _is_too_much(self) -> bool:
        rows = sum(map(len, self.counts))
        return rows > 1 and self.too_much(rows, sum(map(len, self.columns)))

    def _rows(self) -> tuple[Tensor, SparseCodes, Tensor]:
        """All that is kept: beside, codes and the numbers drawn; after a reduction that is of all
        processes."""
        counts, columns = dim_zero_cat(self.counts), dim_zero_cat(self.columns)
        positions = torch.repeat_interleave(counts) * self.latents + columns
        shape = (len(counts), self.latents)
        codes = SparseCodes(dim_zero_cat(self.values), positions, shape)
        beside, drawn = dim_zero_cat(self.beside), dim_zero_cat(self.drawn)
        kept = drawn < 2**31 >> int(self.halvings)
        if kept.all():
            return beside, codes, drawn
        return beside[kept], codes[kept], drawn[kept]

    def _keep(self, beside: Tensor, codes: SparseCodes, drawn: Tensor) -> None:
        """Keep these rows and no others."""
        self.beside, self.counts, self.drawn = [beside], [codes.row_counts()], [drawn]
        self.columns, self.values = [codes.latent], [codes.values]

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


def _drawn(first: int, count: int, device: torch.device) -> Tensor:
    """A number below 2^31 for each of the rows first, first + 1, ..., which looks random."""
    x = torch.arange(first + 1, first + count + 1, device=device)
    for shift, factor in ((16, 0x45D9F3B), (16, 0x45D9F3B)):  # an integer hash of 32 bits
        x = ((x >> shift) ^ x) * factor & 0xFFFFFFFF
    return ((x >> 16) ^ x) >> 1

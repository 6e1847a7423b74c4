"""CKNNA: do tokens and codes agree on who is whose neighbour?

Centred kernel nearest-neighbour alignment (Huh et al., "The Platonic Representation Hypothesis",
2024) with the choices of MSAE (Zaigrajew et al., ICML 2025): linear kernels K = X X^T and
L = Z Z^T, k = 10, the unbiased HSIC of Song et al. (JMLR 2012, eq. 5), the mask
[j in kNN_x(i)] [j in kNN_z(i)], which is not symmetric, and normalisation by the self-alignments.
MSAE's 1e-6 under the fraction is left out: it makes the value depend on the scale of the tokens.

    HSIC(K, L) = (sum_ij K_ij L_ji + 1'K1 1'L1 / ((n - 1)(n - 2)) - 2 1'KL1 / (n - 2)) / (n (n - 3))

with zero diagonals. Every masked kernel has at most k entries a row, so that an N x N matrix is
never held: kernels are formed in blocks of rows, their k largest kept.

N tokens, d width, M latents, k neighbours.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from clipsae.evaluation.metrics.rows import Progress, SampledCodes
from clipsae.evaluation.numbers import Number
from clipsae.evaluation.ranking import top_latents
from clipsae.sae import SparseCodes

NUMBERS = (
    Number(
        "cknna",
        "CKNNA",
        "alignment of the nearest neighbours of tokens and codes",
        paper="cknna",
        headline=True,
    ),
)
_BLOCK_BYTES = 2**27
# Dense products do fifty times the work of sparse ones in the same time.
_DENSE_FROM = 1 / 50
_DENSE_ELEMENTS = 2**25  # of codes in float64, 0.27 GB
# Codes that are not zero, times tokens to compare each with: two minutes of one core.
_WORK = 2**35
_ENTRIES = 2**25


class _Edges(NamedTuple):
    """Entries (row, column) of a masked kernel and their values."""

    rows: Tensor
    columns: Tensor
    values: Tensor


def cknna(
    x: Tensor, codes: Tensor | SparseCodes, k: int = 10, progress: Progress | None = None
) -> Tensor:
    """Alignment of one batch of tokens and their codes.

    Args:
        x: [N, d].
        codes: [N, M], dense or sparse.
        k: neighbours. Among equal kernel values the smaller index is the nearer one.
        progress: called with (tokens done, N).

    Returns:
        float64 scalar, 1 for codes that keep all neighbourhoods; NaN where a self-alignment
        vanishes (codes all zero).

    Raises:
        ValueError: fewer than 4 tokens, or k outside 1..N - 1.
    """
    n = len(x)
    if n < 4 or not 1 <= k < n:
        raise ValueError(
            f"k={k} neighbours of {n} tokens: expected 4 tokens or more and k < tokens"
        )
    if isinstance(codes, Tensor):
        codes = SparseCodes.from_dense(codes.float())
    if len(codes) != n:
        raise ValueError(f"codes of {len(codes)} tokens with {n} tokens: expected as many")
    x = x.double()
    dense = _fits(n, codes.latents) and len(codes.values) > _DENSE_FROM * n * codes.latents
    matrix = codes.dense().double() if dense else codes.csr()

    def kernel_x(start: int, stop: int) -> Tensor:
        return x[start:stop] @ x.T

    def kernel_z(start: int, stop: int) -> Tensor:
        if dense:
            return matrix[start:stop] @ matrix.T
        return (matrix @ codes[start:stop].dense().double().T).T

    of_x = _neighbours(kernel_x, n, d=x.shape[1], k=k)
    of_z = _neighbours(kernel_z, n, d=codes.latents, k=k, progress=progress)
    own_x, own_z = _edges(*of_x), _edges(*of_z)
    shared_x, shared_z = _shared(*of_x, *of_z)
    product = _hsic(own_x, own_x, n) * _hsic(own_z, own_z, n)
    aligned = _hsic(shared_x, shared_z, n)
    return torch.where(product > 0, aligned / product.sqrt(), torch.nan)


class CKNNA(SampledCodes):
    """Mean of `cknna` over full batches of tokens, in the order they come.

    A batch is worked off as soon as it is full; of a rest too small for a batch nothing counts,
    unless there is no full batch at all: then the rest is the batch. Processes add their full
    batches and put their rests together. So with a sample of at most `batch_rows` tokens in all
    the result does not depend on how it came in. Of SAEs with very many active latents it compares
    a part of the tokens (`SampledCodes`), and logs how many: the time grows with their square.

    Args:
        d: width of the tokens.
        latents: M.
        k: neighbours.
        batch_rows: tokens of a batch (MSAE: 10,000).
    """

    what = "tokens"
    total: Tensor
    batches: Tensor

    def __init__(self, d: int, latents: int, k: int = 10, batch_rows: int = 10_000) -> None:
        if batch_rows <= max(k, 3):
            raise ValueError(f"batch_rows={batch_rows}: expected more than k={k}, and at least 4")
        super().__init__(latents, d, torch.float32)
        self.k = k
        self.batch_rows = batch_rows
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("batches", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    def too_much(self, rows: int, entries: int) -> bool:
        tokens = min(rows, self.batch_rows)  # that each is compared with
        slow = tokens * entries > _WORK and not _fits(tokens, self.latents)
        return tokens > 16 * self.k and (entries > _ENTRIES or slow)

    def update(self, x: Tensor, codes: Tensor) -> None:
        """Add tokens [n, d] and their dense codes [n, M]."""
        self._add(x, codes)
        if sum(map(len, self.counts)) >= self.batch_rows:
            total, batches, rest = self._full_batches()
            self.total += total
            self.batches += batches
            self._keep(*rest)

    def compute(self) -> Tensor:
        """float64 scalar; NaN with fewer tokens than k + 1 or 4."""
        total, batches, (x, codes, _) = self._full_batches()
        self._note(codes)
        total = self.total + total
        every = self.batches + batches
        if every == 0 and len(x) > max(self.k, 3):
            return cknna(x, codes, self.k, self.progress)
        return total / every  # 0/0 is NaN

    def _full_batches(self) -> tuple[Tensor, int, tuple[Tensor, SparseCodes, Tensor]]:
        """Sum over the full batches that wait, their number, and the rest."""
        x, codes, drawn = self._rows()
        full = len(x) // self.batch_rows
        total = torch.zeros_like(self.total)
        for start in range(0, full * self.batch_rows, self.batch_rows):
            batch = slice(start, start + self.batch_rows)
            total += cknna(x[batch], codes[batch], self.k, self.progress)
        rest = slice(full * self.batch_rows, None)
        return total, full, (x[rest], codes[rest], drawn[rest])


def _fits(tokens: int, latents: int) -> bool:
    """Whether their codes can be held dense."""
    return tokens * latents <= _DENSE_ELEMENTS


def _neighbours(
    kernel: Callable[[int, int], Tensor],
    n: int,
    d: int,
    k: int,
    progress: Progress | None = None,
) -> tuple[Tensor, Tensor]:
    """Columns and values [n, k] of each row's k largest entries off the diagonal."""
    block = max(1, _BLOCK_BYTES // (8 * max(n, d)))
    columns, values = [], []
    for start in range(0, n, block):
        part = kernel(start, min(start + block, n)).contiguous()
        part.diagonal(start).fill_(-torch.inf)
        columns.append(top_latents(part, k))
        values.append(part.gather(1, columns[-1]))
        if progress is not None:
            progress(min(start + block, n), n)
    return torch.cat(columns), torch.cat(values)


def _edges(columns: Tensor, values: Tensor) -> _Edges:
    rows = torch.arange(len(columns), device=columns.device)
    return _Edges(rows.repeat_interleave(columns.shape[1]), columns.flatten(), values.flatten())


def _shared(
    columns_x: Tensor, values_x: Tensor, columns_z: Tensor, values_z: Tensor
) -> tuple[_Edges, _Edges]:
    """The entries of both kernels where both have a neighbour."""
    same = columns_x[:, :, None] == columns_z[:, None, :]  # [n, k, k]
    row, of_x, of_z = same.nonzero(as_tuple=True)
    columns = columns_x[row, of_x]
    return (
        _Edges(row, columns, values_x[row, of_x]),
        _Edges(row, columns, values_z[row, of_z]),
    )


def _hsic(a: _Edges, b: _Edges, n: int) -> Tensor:
    """Unbiased HSIC of two sparse kernels with the same entries and none on the diagonal."""
    key = a.rows * n + a.columns
    order = key.argsort()
    mirrored = a.columns * n + a.rows
    at = torch.searchsorted(key[order], mirrored).clamp(max=max(len(key) - 1, 0))
    found = key[order][at] == mirrored
    product = (a.values * b.values[order][at])[found].sum()
    zeros = a.values.new_zeros(n)
    column_sums = zeros.index_add(0, a.columns, a.values)
    row_sums = zeros.index_add(0, b.rows, b.values)
    sums = a.values.sum() * b.values.sum() / ((n - 1) * (n - 2))
    chained = 2 * (column_sums * row_sums).sum() / (n - 2)
    return (product + sums - chained) / (n * (n - 3))

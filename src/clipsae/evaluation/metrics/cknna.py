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

from clipsae.evaluation.metrics.base import METRICS, Options
from clipsae.evaluation.metrics.rows import Progress, Sample, SampledCodes
from clipsae.evaluation.numbers import Number
from clipsae.evaluation.passes import Batch
from clipsae.evaluation.ranking import top_latents
from clipsae.sae import SAE, SparseCodes

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


@METRICS.register("cknna")
class CKNNA(SampledCodes):
    """Mean of `cknna` over full batches of a sample of tokens, in the dataset's order.

    Of a rest too small for a batch nothing counts, unless there is no full batch at all: then the
    rest is the batch. Of SAEs with very many active latents it compares a part of the tokens
    (`SampledCodes`), and logs how many: the time grows with their square.
    """

    numbers = NUMBERS
    what = "tokens"
    batch_rows = 10_000  # MSAE's

    def __init__(self, sae: SAE, options: Options) -> None:
        super().__init__(sae, options, sae.config["d"], torch.float32)
        self.sample = Sample(options.images, options.tokens, options.sample_tokens, options.seed)

    def too_much(self, rows: int, entries: int) -> bool:
        batch = min(rows, self.batch_rows)  # tokens that each is compared with
        slow = batch * entries * batch / rows > _WORK and not _fits(batch, self.latents)
        return rows > 16 * self.options.k and (entries > _ENTRIES or slow)

    def update(self, batch: Batch) -> None:
        """Add those of the tokens that are in the sample."""
        rows, numbers = self.sample.among(batch.positions)
        if rows:
            x, codes = batch.tokens.flatten(0, 1)[rows], batch.codes.flatten(0, 1)[rows]
            self._add(torch.tensor(numbers, device=x.device), x, codes)

    def compute(self) -> dict[str, Tensor]:
        """`cknna`; NaN with fewer tokens than k + 1 or 4."""
        _, x, codes = self._rows()
        self._note(codes)
        size = self.batch_rows if len(x) >= self.batch_rows else len(x)
        starts = range(0, len(x) - size + 1, size) if size > max(self.options.k, 3) else ()
        batches = [slice(start, start + size) for start in starts]
        values = [cknna(x[at], codes[at], self.options.k, self._told) for at in batches]
        value = torch.stack(values).mean() if values else x.new_tensor(torch.nan).double()
        found = {"cknna": value}
        if self.compared is not None:
            found["cknna_compared"] = torch.tensor(float(self.compared))
        return found

    def _told(self, done: int, total: int) -> None:
        if self.progress is not None:
            self.progress(done, total, "CKNNA")


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

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

import torch
from torch import Tensor

from clipsae.evaluation.metrics.base import METRICS, Measurement, Options
from clipsae.evaluation.metrics.sample import CodeSample, Draw
from clipsae.evaluation.numbers import Number
from clipsae.evaluation.passes import Batch
from clipsae.evaluation.ranking import top_latents
from clipsae.sae import SAE, SparseCodes

_BLOCK_BYTES = 2**27
# Dense products do fifty times the work of sparse ones in the same time.
_DENSE_FROM = 1 / 50
_DENSE_ELEMENTS = 2**25  # of codes in float64, 0.27 GB
# Codes that are not zero, times tokens to compare each with: two minutes of one core.
_WORK = 2**35
_ENTRIES = 2**25


def cknna(
    x: Tensor,
    codes: Tensor | SparseCodes,
    k: int = 10,
    progress: Callable[[int, int], None] = lambda done, total: None,
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
        raise ValueError(f"k={k} neighbours of {n} tokens: needs at least 4 tokens and k < tokens")
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

    near_x = _neighbours(kernel_x, n, x.shape[1], k)
    near_z = _neighbours(kernel_z, n, codes.latents, k, progress)
    all_x, all_z = _masked(*near_x), _masked(*near_z)
    both = near_x[0][:, :, None] == near_z[0][:, None, :]  # [n, k, k]
    aligned = _hsic(_masked(*near_x, both.any(dim=2)), _masked(*near_z, both.any(dim=1)))
    product = _hsic(all_x, all_x) * _hsic(all_z, all_z)
    return torch.where(product > 0, aligned / product.sqrt(), torch.nan)


def _fits(tokens: int, latents: int) -> bool:
    """Whether their codes can be held dense."""
    return tokens * latents <= _DENSE_ELEMENTS


def _neighbours(
    kernel: Callable[[int, int], Tensor],
    n: int,
    width: int,
    k: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[Tensor, Tensor]:
    """Columns and values [n, k] of each row's k largest entries off the diagonal."""
    block = max(1, _BLOCK_BYTES // (8 * max(n, width)))
    columns, values = [], []
    for start in range(0, n, block):
        part = kernel(start, min(start + block, n)).contiguous()
        part.diagonal(start).fill_(-torch.inf)
        columns.append(top_latents(part, k))
        values.append(part.gather(1, columns[-1]))
        progress(min(start + block, n), n)
    return torch.cat(columns), torch.cat(values)


def _masked(columns: Tensor, values: Tensor, kept: Tensor | None = None) -> Tensor:
    """A kernel's entries [n, k], or those of `kept`, as a sparse matrix [n, n]."""
    n, k = columns.shape
    rows = torch.arange(n, device=columns.device)[:, None].expand(n, k)
    chosen = torch.ones_like(columns, dtype=torch.bool) if kept is None else kept
    places = torch.stack((rows[chosen], columns[chosen]))
    kernel = torch.sparse_coo_tensor(places, values[chosen], (n, n), check_invariants=False)
    return kernel.coalesce()


def _hsic(a: Tensor, b: Tensor) -> Tensor:
    """Unbiased HSIC of two sparse kernels without entries on the diagonal."""
    n = len(a)
    product = (a * b.T.coalesce()).sum()
    ones = torch.ones(n, 1, dtype=a.dtype, device=a.device)
    columns, rows = a.T @ ones, b @ ones
    sums = columns.sum() * rows.sum() / ((n - 1) * (n - 2))
    chained = 2 * (columns * rows).sum() / (n - 2)
    return (product + sums - chained) / (n * (n - 3))


@METRICS.register("cknna")
class CKNNA(Measurement):
    """Mean of `cknna` over full batches of a sample of tokens, in the dataset's order.

    A rest too small for a batch does not count, unless there is no full batch at all: then it is
    the batch. Of SAEs with very many active latents a part of the tokens is compared
    (`CodeSample`), and the log says how many: the time grows with their square.
    """

    numbers = (
        Number(
            "cknna",
            "CKNNA",
            "alignment of the nearest neighbours of tokens and codes",
            paper="cknna",
            headline=True,
        ),
    )
    batch_rows = 10_000  # MSAE's

    def __init__(self, sae: SAE, options: Options) -> None:
        super().__init__(sae, options)
        self.draw = Draw(options.images, options.tokens, options.sample_tokens, options.seed)
        nothing = torch.empty(0, self.d)
        self.sample = CodeSample("CKNNA", "tokens", self.latents, nothing, self.too_many)

    def too_many(self, rows: int, pairs: int) -> bool:
        batch = min(rows, self.batch_rows)  # tokens that each is compared with
        slow = batch * pairs * batch / rows > _WORK and not _fits(batch, self.latents)
        return rows > 16 * self.options.k and (pairs > _ENTRIES or slow)

    def update(self, batch: Batch) -> None:
        rows, numbers = self.draw.among(batch.positions)
        if batch.kept is not None:
            there = batch.kept.flatten().cpu()[rows]
            rows, numbers = rows[there], numbers[there]
        if len(rows):
            drawn = torch.zeros(batch.tokens.shape[:2].numel(), dtype=torch.bool)
            drawn[rows] = True
            drawn = drawn.to(batch.tokens.device)
            x, codes = batch.targets.flatten(0, 1)[drawn], batch.sparse.view(-1, self.latents)
            self.sample.update(numbers, x, codes[drawn])

    def compute(self) -> dict[str, Tensor]:
        """`cknna`; NaN with fewer tokens than k + 1 or 4."""
        x, codes = self.sample.compute()
        k, size = self.options.k, min(len(x), self.batch_rows)
        starts = range(0, len(x) - size + 1, size) if size > max(k, 3) else ()
        batches = [slice(start, start + size) for start in starts]

        def report(done: int, total: int) -> None:
            self.progress(done, total, "CKNNA")

        values = [cknna(x[at], codes[at], k, report) for at in batches]
        found = {"cknna": torch.stack(values).mean() if values else torch.tensor(torch.nan)}
        if self.sample.compared is not None:
            found["cknna_compared"] = torch.tensor(float(self.sample.compared))
        return found

"""What is done with sparse codes, each operation beside a reference in dense products.

| operation    | of codes Z [N, M] at p pairs, X [N, d], rows W [M, d]                    |
|--------------|--------------------------------------------------------------------------|
| `find`       | the scores X W^T + b where an activation wants them, and where that is   |
| `mix`        | Z W                                                                      |
| `sample`     | X W^T at the pairs of Z                                                  |
| `accumulate` | Z^T X, the gradient of a dictionary                                      |
| `count`, `lookup` | pairs of each latent; the codes of given latents                    |

A dense product costs N M d; these cost p d. `Reference` runs wherever torch does; `backend` chooses
what is faster on a device, and `prefers_dense` whether sparse codes pay there at all. A backend
for another device is a subclass here, a line in `backend`, and a share in `DENSE_FROM`.
"""

import warnings
from collections.abc import Callable
from itertools import pairwise
from math import prod
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from clipsae.sae.memory import empty

if TYPE_CHECKING:
    from clipsae.sae.codes import SparseCodes

DENSE_FROM = {"cpu": 0.12}
"""Share of active pairs above which dense products are faster, by type of device. Devices that are
not named always have dense ones.

Measured on whole steps of 512 tokens, M = 49,152, with one thread: a ReLU SAE takes 1.1 s at 3 %,
2.3 at 10 %, 2.6 at 15 % and 3.6 at 20 %, in dense products 2.8. With two threads both are equal at
14 %; larger batches cross a little earlier. (Sparsemax, whose threshold takes passes over all M
where many act: 4.7 s at 16 %, dense 7.6.)
"""

BLOCK = 512  # tokens whose scores are in memory together

# Rows of 4096 latents fit in the cache that tokens would otherwise fetch them to again and again.
_TILE = 4096
# As do so many tokens, which the dictionary's gradient fetches as often. As each chunk adds to all
# of that gradient, it must have some pairs for each of its rows.
_CHUNK = 1024
_PAIRS_A_ROW = 4

Scorer = Callable[[Tensor, Tensor | None], Tensor]
"""Tokens [n, d] and memory to use again -> scores [n, M]."""

Chooser = Callable[[Tensor], Tensor | None]
"""Scores [n, M] -> positions of pairs, token * M + latent; None: dense products are faster."""


def prefers_dense(
    like: Tensor, active: int | Tensor | None = None, total: int | None = None
) -> bool:
    """Whether dense products are to be used: the one switch between dense and sparse.

    Args:
        like: a tensor on the device.
        active: how many codes are not 0. None: whether sparse codes are never used here.
        total: of how many; None: the elements of `like`.
    """
    if active is None:
        return torch.compiler.is_compiling() or like.device.type not in DENSE_FROM
    total = like.numel() if total is None else total
    return bool(active > DENSE_FROM.get(like.device.type, 0) * total)


class Reference:
    """Every operation as its formula, in dense torch."""

    @staticmethod
    def find(
        x: Tensor, scorer: Scorer, choose: Chooser, at_once: bool
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Scores [p] and positions [p] of the pairs that are chosen; or all scores [N, M].

        Args:
            x: tokens [N, d].
            at_once: `choose` must see all tokens together.
        """
        scores = scorer(x, None)
        positions = choose(scores)
        return scores if positions is None else (scores.flatten()[positions], positions)

    @staticmethod
    def mix(codes: "SparseCodes", rows: Tensor) -> Tensor:
        """Z W: rows [M, d] -> [N, d]."""
        return codes.dense().flatten(0, -2).to(rows.dtype) @ rows

    @staticmethod
    def sample(codes: "SparseCodes", x: Tensor, rows: Tensor) -> Tensor:
        """X W^T at the pairs: x [N, d], rows [M, d] -> [p]."""
        return (x @ rows.T).flatten()[codes.positions]

    @staticmethod
    def accumulate(codes: "SparseCodes", x: Tensor) -> Tensor:
        """Z^T X: x [N, d] -> [M, d]."""
        return codes.dense().flatten(0, -2).to(x.dtype).T @ x

    @staticmethod
    def count(codes: "SparseCodes", where: Tensor) -> Tensor:
        """How many of the pairs `where`, BoolTensor [p], each latent has over the tokens of
        [..., T, M]: LongTensor [..., M]."""
        return codes.with_values(where.long()).dense().sum(dim=-2)

    @staticmethod
    def lookup(codes: "SparseCodes", latents: Tensor) -> Tensor:
        """Codes of latents [n], or [B, n] of codes [B, T, M] -> [..., T, n]."""
        index = latents if latents.ndim == 1 else latents[:, None]
        return codes.dense().gather(-1, index.expand(*codes.shape[:-1], -1))


class CPU(Reference):
    """In the order of memory that a processor's cache likes."""

    @staticmethod
    def find(
        x: Tensor, scorer: Scorer, choose: Chooser, at_once: bool
    ) -> Tensor | tuple[Tensor, Tensor]:
        """A few tokens at a time, whose scores stay in the cache."""
        if not len(x):
            return x.new_empty(0), torch.empty(0, dtype=torch.int64, device=x.device)
        block = len(x) if at_once else min(len(x), BLOCK)
        values, positions, buffer = [], [], None
        for start in range(0, len(x), block):
            scores = buffer = scorer(x[start : start + block], buffer)
            chosen = choose(scores)
            if chosen is None:
                return scores if block == len(x) else _all(x, scorer, scores, start)
            values.append(scores.flatten().index_select(0, chosen))
            positions.append(chosen + start * scores.shape[1])
        return torch.cat(values), torch.cat(positions)

    @staticmethod
    def mix(codes: "SparseCodes", rows: Tensor) -> Tensor:
        chunks = _chunks(codes)
        if chunks:
            parts = (part.with_values(codes.values[pairs]) for _, pairs, part in chunks)
            return torch.cat([CPU.mix(part, rows) for part in parts])
        order, latent, begin = _by_tile(codes)
        out = rows.new_zeros(codes.tokens, rows.shape[1])
        values = codes.values.to(rows.dtype)[order]
        for tile in begin:
            first, last = int(tile[0]), int(tile[-1])
            if first < last:
                pairs = slice(first, last)
                out += _bags(latent[pairs], rows, tile - first, values[pairs])
        return out

    @staticmethod
    def sample(codes: "SparseCodes", x: Tensor, rows: Tensor) -> Tensor:
        chunks = _chunks(codes)
        if chunks:
            out = rows.new_empty(len(codes.positions))
            for tokens, pairs, part in chunks:
                out[pairs] = CPU.sample(part, x[tokens], rows)
            return out
        order, token, begin = _by_latent(codes)
        # By latents: each row is read once, and tokens stay in the cache.
        values = rows.new_zeros(len(token))
        shape = (codes.latents, codes.tokens)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")
            pattern = torch.sparse_csr_tensor(begin, token, values, shape, check_invariants=False)
        found = torch.sparse.sampled_addmm(pattern, rows, x.T, beta=0).values()
        return torch.empty_like(found).index_copy_(0, order, found)

    @staticmethod
    def accumulate(codes: "SparseCodes", x: Tensor) -> Tensor:
        out = empty(codes.latents, x.shape[1], like=x)
        whole = [(slice(None), slice(None), codes)]
        for i, (tokens, pairs, part) in enumerate(_chunks(codes) or whole):
            order, token, begin = _by_latent(part)
            values = codes.values[pairs].to(x.dtype)[order]
            for start in range(0, codes.latents, _TILE):
                edges = begin[start : start + _TILE + 1]
                tile = slice(int(edges[0]), int(edges[-1]))
                found = _bags(token[tile], x[tokens], edges - edges[0], values[tile])
                rows = out[start : start + _TILE]
                rows.copy_(found) if i == 0 else rows.add_(found)
        return out

    @staticmethod
    def count(codes: "SparseCodes", where: Tensor) -> Tensor:
        shape = (*codes.shape[:-2], codes.latents)
        return torch.bincount(codes.cell[where], minlength=prod(shape)).view(shape)

    @staticmethod
    def lookup(codes: "SparseCodes", latents: Tensor) -> Tensor:
        token = torch.arange(codes.tokens, device=latents.device).view(*codes.shape[:-1], 1)
        chosen = latents if latents.ndim == 1 else latents[:, None]
        wanted = (token * codes.latents + chosen).to(codes.positions.dtype)
        if not len(codes.positions):
            return codes.values.new_zeros(wanted.shape)
        at = torch.searchsorted(codes.positions, wanted).clamp_(max=len(codes.positions) - 1)
        return torch.where(codes.positions[at] == wanted, codes.values[at], 0)


def backend(like: Tensor) -> type[Reference]:
    """What does the operations on a tensor's device. (`count` and `lookup` of the CPU are of
    torch's own operations and serve all devices.)"""
    return CPU if like.device.type == "cpu" else _Elsewhere


class _Elsewhere(Reference):
    count = CPU.count
    lookup = CPU.lookup


def _all(x: Tensor, scorer: Scorer, latest: Tensor, start: int) -> Tensor:
    """All scores, of which the first tokens' may be there."""
    if start > 0:
        return scorer(x, None)
    out = empty(len(x), latest.shape[1], like=latest)
    out[: len(latest)] = latest
    if len(latest) < len(x):
        rest = scorer(x[len(latest) :], out[len(latest) :])
        if rest.data_ptr() != out[len(latest) :].data_ptr():  # under autocast
            out[len(latest) :] = rest
    return out


def _chunks(codes: "SparseCodes") -> list[tuple[slice, Tensor | slice, "SparseCodes"]]:
    """Tokens, which pairs are theirs, and the pairs of these tokens alone; none where all is better
    done at once."""

    def make() -> list[tuple[slice, Tensor | slice, "SparseCodes"]]:
        n, m = codes.tokens, codes.latents
        if n <= _CHUNK or len(codes.positions) * _CHUNK < _PAIRS_A_ROW * n * m:
            return []
        chunk, order = torch.div(codes.positions, _CHUNK * m, rounding_mode="floor"), None
        if (chunk.diff() < 0).any():
            chunk, order = torch.sort(chunk, stable=True)
        starts = range(0, n, _CHUNK)
        edges = torch.searchsorted(chunk, torch.arange(len(starts) + 1, device=chunk.device))
        found = []
        for start, (first, last) in zip(starts, pairwise(edges.tolist()), strict=True):
            pairs = slice(first, last) if order is None else order[first:last]
            size = min(_CHUNK, n - start)
            positions = codes.positions[pairs] - start * m
            part = type(codes)(codes.values.detach()[pairs], positions, (size, m))
            found.append((slice(start, start + size), pairs, part))
        return found

    return codes.derived("chunks", make)


def _by_latent(codes: "SparseCodes") -> tuple[Tensor, Tensor, Tensor]:
    """Pairs sorted by latent [p], their tokens [p], and where each latent's begin [M + 1]."""

    def make() -> tuple[Tensor, Tensor, Tensor]:
        order, begin = _sorted_by(codes.latent, codes.latents)
        return order, codes.token[order], begin

    return codes.derived("by latent", make)


def _by_tile(codes: "SparseCodes") -> tuple[Tensor, Tensor, Tensor]:
    """Pairs sorted by tile of latents and token, their latents, where each tile's tokens begin
    [tiles, N + 1]."""

    def make() -> tuple[Tensor, Tensor, Tensor]:
        n, tiles = codes.tokens, -(-codes.latents // _TILE)
        tile = torch.div(codes.latent, _TILE, rounding_mode="floor")
        order, begin = _sorted_by(tile * n + codes.token, tiles * n)
        return order, codes.latent[order], begin.as_strided((tiles, n + 1), (n, 1))

    return codes.derived("by tile", make)


def _sorted_by(key: Tensor, keys: int) -> tuple[Tensor, Tensor]:
    """The order by key [p], and where each of 0 ... keys begins in it [keys + 1]."""
    ordered, order = torch.sort(key, stable=True)
    return order, torch.searchsorted(ordered, torch.arange(keys + 1, device=key.device))


def _bags(index: Tensor, rows: Tensor, begin: Tensor, weights: Tensor) -> Tensor:
    # Detached: where rows ask for a gradient, what its own backward pass would need is made, too.
    return embedding_bag(
        index,
        rows.detach(),
        begin,
        mode="sum",
        per_sample_weights=weights.detach(),
        include_last_offset=True,
    )

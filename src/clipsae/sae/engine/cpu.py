"""The operations on a CPU: in the order of memory that a processor's cache likes."""

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from clipsae.sae.codes import SparseCodes, csr
from clipsae.sae.dense import at_least_float32, empty
from clipsae.sae.engine.reference import (
    Chosen,
    Reference,
    Scorer,
    Share,
    below_largest,
    largest,
    newton,
    placed,
    rounded_down,
    strided_maxima,
)
from clipsae.sae.engine.switch import prefers_dense

BLOCK = 512  # tokens whose scores are in memory together

# Rows of 4096 latents fit in the cache that tokens would otherwise fetch them to again and again.
_TILE = 4096
# As do so many tokens, which gradients fetch as often. As each chunk adds to all
# of that gradient, it must have some pairs for each of its rows.
_CHUNK = 1024
_PAIRS_A_ROW = 4


class CPU(Reference):
    """`None` for `Chosen` as soon as it is seen that dense products are faster."""

    @staticmethod
    def above(scores: Tensor, floor: Tensor, by: Tensor | None = None) -> Chosen:
        return positions_above(scores if by is None else by, floor)

    @staticmethod
    def largest(scores: Tensor, k: int, by: Tensor | None = None) -> Chosen:
        n, m = scores.shape
        first = m * torch.arange(n, device=scores.device)[:, None]
        return (largest(scores if by is None else by, k)[1] + first).flatten()

    @staticmethod
    def largest_of_all(scores: Tensor, count: int, share: Share) -> Chosen:
        floor, _ = below_largest(scores, count)
        positions = positions_above(scores, floor)
        if positions is None:
            return None
        values = scores.flatten().index_select(0, positions)
        kept = int(share(values))
        return (
            positions if kept == len(values) else positions[values.topk(kept, sorted=False).indices]
        )

    @staticmethod
    def sparsemax(scores: Tensor, zeroed: Tensor | None = None) -> Chosen:
        if zeroed is not None:
            capped = zeroed.nonzero()[:, 0]
            if len(capped):
                scores.index_fill_(1, capped, 0)
        found = _from_maxima(scores)
        return None if found is None else found[1]

    @staticmethod
    def sparsemax_threshold(scores: Tensor) -> Tensor:
        found = _from_maxima(scores)
        return newton(scores, _lower_bound(scores).double()) if found is None else found[0]

    @classmethod
    def find(
        cls,
        x: Tensor,
        scorer: Scorer,
        choose: Callable[[Tensor], Chosen],
        *,
        most: int,
        at_once: bool = False,
        wait: bool = True,
    ) -> Tensor | SparseCodes:
        """A few tokens at a time, whose scores stay in the cache."""
        n = len(x)
        block = max(1, n if at_once else min(n, BLOCK))
        values, positions, buffer = [], [], None
        for start in range(0, max(1, n), block):
            scores = buffer = scorer(x[start : start + block], buffer)
            chosen = choose(scores) if n else scores.new_empty(0, dtype=torch.int64)
            found = None if chosen is None else placed(scores, chosen)
            if found is None or n * len(found.values) > most * len(scores):
                return scores if block == n else _all(x, scorer, scores, start)
            values.append(found.values)
            positions.append(found.positions + start * scores.shape[1])
        return SparseCodes(torch.cat(values), torch.cat(positions), (n, scores.shape[1]))

    @staticmethod
    def mix(codes: SparseCodes, rows: Tensor) -> Tensor:
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
    def sample(codes: SparseCodes, x: Tensor, rows: Tensor) -> Tensor:
        chunks = _chunks(codes)
        if chunks:
            out = rows.new_empty(len(codes.positions))
            for tokens, pairs, part in chunks:
                out[pairs] = CPU.sample(part, x[tokens], rows)
            return out
        order, token, begin = _by_latent(codes)
        # By latents: each row is read once, and tokens stay in the cache.
        pattern = csr(begin, token, rows.new_zeros(len(token)), codes.tokens)
        found = torch.sparse.sampled_addmm(pattern, rows, x.T, beta=0).values()
        return torch.empty_like(found).index_copy_(0, order, found)

    @staticmethod
    def accumulate(codes: SparseCodes, x: Tensor) -> Tensor:
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


# --- which pairs ---


def positions_above(scores: Tensor, floor: Tensor) -> Tensor | None:
    """Where scores [N, M] > floor (broadcast): LongTensor [p], token * M + latent, ascending.

    None where dense products are faster, by a look at every 32nd token before the rest is done.
    """
    floor = rounded_down(floor, scores)
    some = scores[::32]
    if prefers_dense(some, int(torch.count_nonzero(some > floor.expand_as(scores)[::32]))):
        return None
    passing = (scores > floor).flatten()
    if len(passing) % 8:
        return passing.nonzero()[:, 0]
    # Eight at a time, as nearly all are False.
    words = passing.view(torch.int64).nonzero()[:, 0]
    within = passing.view(-1, 8).index_select(0, words).flatten().nonzero()[:, 0]
    return words.index_select(0, within >> 3).mul_(8).add_(within & 7)


@torch.no_grad()
def _from_maxima(scores: Tensor) -> tuple[Tensor, Tensor] | None:
    """tau [N, 1] in float64 of scores [N, M], and the positions token * M + latent above it.

    None where they are so many that passes over all M are faster.
    """
    bound = _lower_bound(scores)
    positions = positions_above(scores, bound)
    if positions is None:
        return None
    n, m = scores.shape
    tau = bound[:, 0].double()
    values = scores.flatten().index_select(0, positions).double()
    token = torch.div(positions, m, rounding_mode="floor")
    while True:
        size = torch.bincount(token, minlength=n)
        total = tau.new_zeros(n).index_add_(0, token, values)
        tau = torch.maximum(tau, (total - 1) / size.clamp(min=1))
        above = (values > tau.index_select(0, token)).nonzero()[:, 0]
        if len(above) == len(values):
            return tau[:, None], positions
        values, token, positions = (t.index_select(0, above) for t in (values, token, positions))


def _lower_bound(scores: Tensor) -> Tensor:
    """Slightly below tau, or less: [N, 1] of scores [N, M], float32 at least."""
    fine = at_least_float32(strided_maxima(scores, 16) if scores.shape[-1] >= 512 else scores)
    bound = fine.amax(dim=-1, keepdim=True) - 1
    if scores.shape[-1] >= 512:
        bound = _approach(strided_maxima(fine, 4), bound)
    return _approach(fine, bound)


def _approach(scores: Tensor, tau: Tensor) -> Tensor:
    """Newton's steps from lower bounds tau [N, 1] to just below the solutions."""
    top = scores.amax(dim=-1, keepdim=True)
    eps = torch.finfo(scores.dtype).eps
    for _ in range(50):
        rest = (scores - tau).relu_()
        total = rest.sum(dim=-1, keepdim=True)
        # Ones are summed in place: `count_nonzero` would first make them int64.
        step = (total - 1) / rest.sign_().sum(dim=-1, keepdim=True).clamp(min=1)
        # What rounding may have added.
        margin = 64 * eps * (top - tau) + 4 * eps * tau.abs()
        if not (step > 2 * margin).any():
            break
        tau = torch.maximum(tau, tau + step - margin)
    return tau - margin


# --- products ---


def _all(x: Tensor, scorer: Scorer, latest: Tensor, start: int) -> Tensor:
    """All scores; `latest` are those of the first tokens where start is 0."""
    if start > 0:
        return scorer(x, None)
    out = empty(len(x), latest.shape[1], like=latest)
    out[: len(latest)] = latest
    if len(latest) < len(x):
        rest = scorer(x[len(latest) :], out[len(latest) :])
        if rest.data_ptr() != out[len(latest) :].data_ptr():  # under autocast
            out[len(latest) :] = rest
    return out


def _chunks(codes: SparseCodes) -> list[tuple[slice, Tensor | slice, SparseCodes]]:
    """Tokens, which pairs are theirs, and the pairs of these tokens alone; empty where one pass
    over all is better."""

    def make() -> list[tuple[slice, Tensor | slice, SparseCodes]]:
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
            part = SparseCodes(codes.values.detach()[pairs], positions, (size, m))
            found.append((slice(start, start + size), pairs, part))
        return found

    return codes.derived("chunks", make)


def _by_latent(codes: SparseCodes) -> tuple[Tensor, Tensor, Tensor]:
    """Pairs sorted by latent [p], their tokens [p], and where each latent's begin [M + 1]."""

    def make() -> tuple[Tensor, Tensor, Tensor]:
        latent, order = torch.sort(codes.latent, stable=True)
        begin = torch.searchsorted(latent, torch.arange(codes.latents + 1, device=latent.device))
        return order, codes.token[order], begin

    return codes.derived("by latent", make)


def _by_tile(codes: SparseCodes) -> tuple[Tensor | slice, Tensor, Tensor]:
    """Pairs sorted by tile of latents and token, their latents, where each tile's tokens begin
    [tiles, N + 1]."""

    def make() -> tuple[Tensor | slice, Tensor, Tensor]:
        n, tiles = codes.tokens, -(-codes.latents // _TILE)
        tile = torch.div(codes.latent, _TILE, rounding_mode="floor")
        key = tile * n + codes.token
        order: Tensor | slice = slice(None)
        if (key.diff() < 0).any():  # one tile's pairs mostly come in order
            key, order = torch.sort(key, stable=True)
        begin = torch.searchsorted(key, torch.arange(tiles * n + 1, device=key.device))
        return order, codes.latent[order], begin.as_strided((tiles, n + 1), (n, 1))

    return codes.derived("by tile", make)


def _bags(index: Tensor, rows: Tensor, begin: Tensor, weights: Tensor) -> Tensor:
    # Detached: where rows require a gradient, embedding_bag prepares its backward pass, too.
    return embedding_bag(
        index,
        rows.detach(),
        begin,
        mode="sum",
        per_sample_weights=weights.detach(),
        include_last_offset=True,
    )

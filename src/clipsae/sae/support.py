"""Where codes are not zero, and the products that touch these places alone.

Letters: N tokens, d width, M latents. A dense product of tokens and dictionary costs N M d; one
on the support costs as many rows of d numbers as there are active pairs of token and latent. On a
CPU the second is cheaper below a share of all pairs, `DENSE_FROM`.
"""

import warnings
from collections.abc import Sequence
from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from clipsae.sae.memory import empty

DENSE_FROM = {"cpu": 0.12}
"""Share of active pairs above which dense products are faster, by type of device. Devices that are
not named always have dense ones.

Measured on whole steps of 512 tokens, M = 49,152, with one thread: a ReLU SAE takes 1.1 s at 3 %,
2.3 at 10 %, 2.6 at 15 % and 3.6 at 20 %, in dense products 2.8. With two threads both are equal at
14 %; larger batches cross a little earlier. (Sparsemax, whose threshold takes passes over all M
where many act: 4.7 s at 16 %, dense 7.6.)
"""

# Rows of 4096 latents fit in the cache that tokens would otherwise fetch them to again and again.
_TILE = 4096
# As do so many tokens, which the dictionary's gradient fetches as often. As each chunk adds to all
# of that gradient, it must have some pairs for each of its rows.
_CHUNK = 1024
_PAIRS_A_ROW = 4


class Support:
    """Pairs of token and latent, in any order, none of them twice.

    Args:
        positions: LongTensor [p], token * M + latent.
        tokens: N.
        latents: M.
    """

    def __init__(self, positions: Tensor, tokens: int, latents: int) -> None:
        self.positions = positions
        self.tokens = tokens
        self.latents = latents
        self.pending: list[tuple[Tensor, Tensor]] = []
        """Terms of `transposed_times` that the scores' backward pass adds: see `products`."""

    @cached_property
    def token(self) -> Tensor:
        """[p]."""
        return torch.div(self.positions, self.latents, rounding_mode="floor")

    @cached_property
    def latent(self) -> Tensor:
        """[p]."""
        return self.positions % self.latents

    @cached_property
    def _chunks(self) -> list[tuple[slice, Tensor | slice, "Support"]]:
        """Tokens, which pairs are theirs, and the support of these tokens alone; none where all
        is better done at once."""
        few = len(self.positions) * _CHUNK < _PAIRS_A_ROW * self.tokens * self.latents
        if self.tokens <= _CHUNK or few:
            return []
        size = _CHUNK * self.latents
        chunk, order = torch.div(self.positions, size, rounding_mode="floor"), None
        if (chunk.diff() < 0).any():
            chunk, order = torch.sort(chunk, stable=True)
        starts = range(0, self.tokens, _CHUNK)
        edges = torch.searchsorted(chunk, torch.arange(len(starts) + 1, device=chunk.device))
        found = []
        for start, (first, last) in zip(starts, pairwise(edges.tolist()), strict=True):
            pairs = slice(first, last) if order is None else order[first:last]
            n = min(_CHUNK, self.tokens - start)
            part = Support(self.positions[pairs] - start * self.latents, n, self.latents)
            found.append((slice(start, start + n), pairs, part))
        return found

    @cached_property
    def _by_latent(self) -> tuple[Tensor, Tensor, Tensor]:
        """Pairs sorted by latent [p], their tokens [p], and where each latent's begin [M + 1]."""
        order, begin = _sorted_by(self.latent, self.latents)
        return order, self.token[order], begin

    @cached_property
    def _by_tile(self) -> tuple[Tensor, Tensor, Tensor]:
        """Pairs sorted by tile of latents and token, their latents, where each tile's tokens
        begin [tiles, N + 1]."""
        tiles = -(-self.latents // _TILE)
        tile = torch.div(self.latent, _TILE, rounding_mode="floor")
        order, begin = _sorted_by(tile * self.tokens + self.token, tiles * self.tokens)
        begin = begin.as_strided((tiles, self.tokens + 1), (self.tokens, 1))
        return order, self.latent[order], begin

    def count(self, chosen: Tensor) -> Tensor:
        """Pairs of each latent, LongTensor [M], that are chosen: BoolTensor [p]."""
        return torch.bincount(self.latent[chosen], minlength=self.latents)

    def per_latent(self, values: Tensor) -> Tensor:
        """Sums over each latent's tokens: [p] -> [M]."""
        return values.new_zeros(self.latents).index_add_(0, self.latent, values)

    def dense(self, values: Tensor) -> Tensor:
        """[p] -> [N, M], differentiable."""
        flat = values.new_zeros(self.tokens * self.latents)
        return flat.scatter(0, self.positions, values).view(self.tokens, self.latents)

    def times_rows(self, values: Tensor, rows: Tensor) -> Tensor:
        """Z rows, with Z the sparse [N, M] of values [p], rows [M, d] -> [N, d]."""
        if self._chunks:
            return torch.cat([part.times_rows(values[p], rows) for _, p, part in self._chunks])
        order, latent, begin = self._by_tile
        out = rows.new_zeros(self.tokens, rows.shape[1])
        values = values.to(rows.dtype)[order]
        for tile in begin:
            first, last = int(tile[0]), int(tile[-1])
            if first < last:
                pairs = slice(first, last)
                out += _bags(latent[pairs], rows, tile - first, values[pairs])
        return out

    def transposed_times(self, *terms: tuple[Tensor, Tensor]) -> Tensor:
        """The sum of Z^T of_tokens over terms: values [p] of Z, of_tokens [N, d] -> [M, d]."""
        out = empty(self.latents, terms[0][1].shape[1], like=terms[0][1])
        if not self._chunks:
            return self._transposed_times(terms, out, add=False)
        for tokens, pairs, part in self._chunks:
            mine = [(values[pairs], of_tokens[tokens]) for values, of_tokens in terms]
            part._transposed_times(mine, out, add=tokens.start > 0)
        return out

    def _transposed_times(
        self, terms: Sequence[tuple[Tensor, Tensor]], out: Tensor, add: bool
    ) -> Tensor:
        order, token, begin = self._by_latent
        # One table of all terms' tokens: the result is written once.
        table = torch.cat([of_tokens for _, of_tokens in terms])
        values = torch.stack([v.to(table.dtype)[order] for v, _ in terms], dim=1).flatten()
        shift = self.tokens * torch.arange(len(terms), device=token.device)
        token, begin = (token[:, None] + shift).flatten(), begin * len(terms)
        for start in range(0, self.latents, _TILE):
            part = begin[start : start + _TILE + 1]
            first, last = int(part[0]), int(part[-1])
            pairs = slice(first, last)
            found = _bags(token[pairs], table, part - first, values[pairs])
            rows = out[start : start + _TILE]
            rows.add_(found) if add else rows.copy_(found)
        return out

    def sampled(self, of_tokens: Tensor, rows: Tensor) -> Tensor:
        """of_tokens rows^T on the support: [N, d], [M, d] -> [p]."""
        if self._chunks:
            parts = [(pairs, part.sampled(of_tokens[t], rows)) for t, pairs, part in self._chunks]
            out = rows.new_empty(len(self.positions))
            for pairs, found in parts:
                out[pairs] = found
            return out
        order, token, begin = self._by_latent
        # By latents: each row is read once, and tokens stay in the cache.
        values = rows.new_zeros(len(token))
        shape = (self.latents, self.tokens)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")
            pattern = torch.sparse_csr_tensor(begin, token, values, shape, check_invariants=False)
        found = torch.sparse.sampled_addmm(pattern, rows, of_tokens.T, beta=0).values()
        return torch.empty_like(found).index_copy_(0, order, found)


def too_dense(active: int | Tensor, scores: Tensor) -> bool:
    """Whether dense products are faster where so many of the scores are active."""
    return bool(active > DENSE_FROM.get(scores.device.type, 0) * scores.numel())


def above(scores: Tensor, floor: Tensor) -> Tensor:
    """scores > floor (broadcast), exact where the floor is float64 and the scores are not."""
    return scores > _rounded_down(floor, scores)


def _rounded_down(floor: Tensor, scores: Tensor) -> Tensor:
    """A float64 floor in float32, where scores have no more digits: none of them lies between the
    two, and all of them need not be made float64 to be compared."""
    if floor.dtype != torch.float64 or scores.dtype == torch.float64:
        return floor
    rounded = floor.float()
    down = torch.nextafter(rounded, torch.full_like(rounded, -torch.inf))
    return torch.where(rounded.double() > floor, down, rounded)


def positions_above(scores: Tensor, floor: Tensor) -> Tensor | None:
    """Where scores [N, M] > floor (broadcast): LongTensor [p], token * M + latent, ascending.

    None where dense products are faster: a look at every 32nd token tells before the rest is done.
    """
    floor = _rounded_down(floor, scores)
    some = scores[::32]
    if too_dense(torch.count_nonzero(some > floor.expand_as(scores)[::32]), some):
        return None
    passing = (scores > floor).flatten()
    if len(passing) % 8:
        return passing.nonzero()[:, 0]
    # Eight at a time, as nearly all are False.
    words = passing.view(torch.int64).nonzero()[:, 0]
    within = passing.view(-1, 8).index_select(0, words).flatten().nonzero()[:, 0]
    return words.index_select(0, within >> 3).mul_(8).add_(within & 7)


def strided_maxima(scores: Tensor, stride: int) -> Tensor:
    """[N, M] -> [N, M // stride], each the largest of `stride` scores: of m, m + M // stride, ...

    The last M % stride scores are in none.
    """
    parts = scores.shape[-1] // stride
    return scores[..., : stride * parts].unflatten(-1, (stride, parts)).amax(dim=-2)


def largest(scores: Tensor, k: int, stride: int = 16) -> tuple[Tensor, Tensor]:
    """The k largest of each token, unsorted: values and indices [N, k] of scores [N, M].

    `topk` without a queue over all M: the k largest are in the k groups with the largest maxima.
    """
    m = scores.shape[-1]
    parts = m // stride
    if parts < 2 * k:
        return torch.topk(scores, k, dim=-1, sorted=False)
    groups = strided_maxima(scores, stride).topk(k, dim=-1, sorted=False).indices
    within = parts * torch.arange(stride, device=scores.device)
    columns = (groups[:, :, None] + within).flatten(1)
    in_none = torch.arange(stride * parts, m, device=scores.device).expand(len(scores), -1)
    columns = torch.cat([columns, in_none], dim=-1)
    values, chosen = scores.gather(-1, columns).topk(k, dim=-1, sorted=False)
    return values, columns.gather(-1, chosen)


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

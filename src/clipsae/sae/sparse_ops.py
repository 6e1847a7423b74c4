"""Products with sparse codes: `find` and `mix` with their gradients, and what computes them.

| operation    | of codes Z [N, M] at p pairs, X [N, d], rows W [M, d]                    |
|--------------|--------------------------------------------------------------------------|
| `find`       | the scores X W^T + b where an activation wants them, and where that is   |
| `mix`        | Z W                                                                      |
| `sample`     | X W^T at the pairs of Z                                                  |
| `accumulate` | Z^T X, the gradient of a dictionary                                      |

A dense product costs N M d; these cost p d. `Reference` has each as its formula and runs wherever
torch does; `backend` chooses what is faster on a device, `prefers_dense` whether sparse codes pay
there at all. A backend for another device is a subclass of `Reference`, a line in `backend`, and a
share in `DENSE_FROM`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding_bag

from clipsae.sae.codes import SparseCodes, csr
from clipsae.sae.dense import at_least_float32, empty

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
# As do so many tokens, which gradients fetch as often. As each chunk adds to all
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
    """Whether to use dense products: the one switch between dense and sparse.

    Args:
        like: a tensor on the device.
        active: how many codes are not 0. None: whether sparse codes are never used here.
        total: of how many; None: the elements of `like`.
    """
    if active is None:
        return torch.compiler.is_compiling() or like.device.type not in DENSE_FROM
    total = like.numel() if total is None else total
    return bool(active > DENSE_FROM.get(like.device.type, 0) * total)


# --- with gradients ---


@dataclass(frozen=True)
class Dictionary:
    """The encoder of an SAE whose scores are (x - center) encoder^T + bias.

    One dense product of tokens and encoder remains, that of the scores; gradients touch the active
    pairs alone. Where too many pairs are active (or the activation has no `support`), gradients
    are dense products, one fewer than autograd would do.

    Attributes:
        encoder: [M, d]; bias: [M] or None; center: [d] or None.
    """

    encoder: Tensor
    bias: Tensor | None = None
    center: Tensor | None = None

    def find(
        self, x: Tensor, choose: Chooser, *, at_once: bool = False, latents: Tensor | None = None
    ) -> Tensor | SparseCodes:
        """The scores of the chosen pairs, as sparse codes [N, M]; or all scores [N, M].

        Args:
            x: [N, d].
            choose: where codes may be.
            at_once: it must see all tokens together, not block by block.
            latents: LongTensor [n]: it sees the scores of these alone, and must not return None.
        """
        m = len(self.encoder)
        part = self
        if latents is not None:
            bias = None if self.bias is None else self.bias[latents]
            part = Dictionary(self.encoder[latents], bias, self.center)
        with torch.no_grad():
            found = backend(x).find(x, part.scores, choose, at_once)
        if isinstance(found, Tensor):
            return _Scores.apply(x, self.center, self.encoder, self.bias, found, None)
        values, positions = found
        if latents is not None:
            token = torch.div(positions, len(latents), rounding_mode="floor")
            positions = token * m + latents[positions % len(latents)]
        # (Detached: the graph must not hold its own result.)
        pairs = SparseCodes(values.detach(), positions, (len(x), m))
        scores = _Scores.apply(x, self.center, self.encoder, self.bias, values, pairs)
        return pairs.with_values(scores)

    def scores(self, x: Tensor, buffer: Tensor | None = None) -> Tensor:
        """[N, d] -> [N, M], in the first rows of a buffer from an earlier call if there is one."""
        query = x if self.center is None else x - self.center
        if torch.is_autocast_enabled(x.device.type):
            return nn.functional.linear(query, self.encoder, self.bias)
        if buffer is None:
            buffer = empty(len(x), len(self.encoder), like=query)
        out = buffer if len(x) == len(buffer) else buffer[: len(x)]
        if self.bias is None:
            return torch.mm(query, self.encoder.T, out=out)
        return torch.addmm(self.bias, query, self.encoder.T, out=out)


def mix(codes: Tensor | SparseCodes, rows: Tensor) -> Tensor:
    """Codes times the decoder's rows: [..., M], [M, d] -> [..., d]."""
    if isinstance(codes, SparseCodes):
        return _Mix.apply(codes.values, rows, codes).view(*codes.shape[:-1], rows.shape[1])
    if prefers_dense(codes) or codes.ndim != 2:
        return codes @ rows
    return _Mix.apply(codes, rows, None)


class _Scores(torch.autograd.Function):
    """(x - center) encoder^T + bias, computed before: at pairs [p], or all [N, M].

    The gradient of the center needs no product over tokens: it is - (sum over tokens of the
    scores' gradient) encoder.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        center: Tensor | None,
        encoder: Tensor,
        bias: Tensor | None,
        scores: Tensor,
        pairs: SparseCodes | None,
    ) -> Tensor:
        ctx.save_for_backward(x, center, encoder, bias)
        ctx.pairs = pairs
        ctx.mark_dirty(scores)  # the same memory, now with a gradient
        return scores

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, center, encoder, bias = ctx.saved_tensors
        for_x, for_center, for_encoder, for_bias = ctx.needs_input_grad[:4]
        z = _matrix(gradient, ctx.pairs)
        grads: list[Tensor | None] = [None] * 6
        if for_x:
            rows = encoder.to(z.dtype)
            product = z @ rows if isinstance(z, Tensor) else backend(rows).mix(z, rows)
            grads[0] = product.to(x.dtype)
        if for_center or for_bias:
            summed = _sum_tokens(z)
        if for_center:
            grads[1] = -(summed @ encoder.to(summed.dtype)).to(center.dtype)
        if for_encoder:
            grads[2] = _accumulate(z, x if center is None else x - center).to(encoder.dtype)
        if for_bias:
            grads[3] = summed.to(bias.dtype)
        return tuple(grads)


class _Mix(torch.autograd.Function):
    """Codes times rows [M, d] -> [N, d]: of values [p] at pairs, or all [N, M]."""

    @staticmethod
    def forward(ctx: Any, codes: Tensor, rows: Tensor, pairs: SparseCodes | None) -> Tensor:
        ctx.save_for_backward(codes, rows)
        ctx.pairs = pairs
        if pairs is None:
            return codes @ rows
        wide = at_least_float32(rows)
        return backend(rows).mix(pairs.with_values(codes), wide).to(rows.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        codes, rows = ctx.saved_tensors
        for_codes, for_rows, _ = ctx.needs_input_grad
        z = _matrix(codes, ctx.pairs)
        codes_grad = _sample(z, gradient, rows).to(codes.dtype) if for_codes else None
        rows_grad = _accumulate(z, gradient).to(rows.dtype) if for_rows else None
        return codes_grad, rows_grad, None


# Products of a backward pass with a matrix z [N, M], dense or at pairs. Dense ones have the dtype
# of the gradient (half precision, where the forward pass had it); those at pairs float32 at least,
# as sparse kernels have no other.


def _matrix(values: Tensor, pairs: SparseCodes | None) -> Tensor | SparseCodes:
    return values if pairs is None else pairs.with_values(at_least_float32(values))


def _accumulate(z: Tensor | SparseCodes, x: Tensor) -> Tensor:
    """x [N, d] -> [M, d]."""
    if isinstance(z, SparseCodes):
        return backend(x).accumulate(z, at_least_float32(x))
    return torch.mm(z.to(x.dtype).T, x, out=empty(z.shape[1], x.shape[1], like=x))


def _sample(z: Tensor | SparseCodes, x: Tensor, rows: Tensor) -> Tensor:
    """x [N, d], rows [M, d] -> [p] or [N, M]."""
    if isinstance(z, SparseCodes):
        x = at_least_float32(x)
        return backend(x).sample(z, x, rows.to(x.dtype))
    return torch.mm(x, rows.to(x.dtype).T, out=empty(len(x), len(rows), like=x))


def _sum_tokens(z: Tensor | SparseCodes) -> Tensor:
    """Sums over tokens, [M], float32 at least."""
    if isinstance(z, SparseCodes):
        return z.sum_tokens(z.values)
    return z.sum(dim=0, dtype=at_least_float32(z[:0]).dtype)


# --- which pairs: above a threshold, or the k largest of a token ---


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

    None where dense products are faster, by a look at every 32nd token before the rest is done.
    """
    floor = _rounded_down(floor, scores)
    some = scores[::32]
    if prefers_dense(some, torch.count_nonzero(some > floor.expand_as(scores)[::32])):
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


def largest_positions(scores: Tensor, k: int) -> Tensor:
    """`largest` as positions [N * k], token * M + latent."""
    n, m = scores.shape
    first = m * torch.arange(n, device=scores.device)[:, None]
    return (largest(scores, k)[1] + first).flatten()


# --- without gradients, by device ---


class Reference:
    """Every operation as its formula, in dense torch."""

    @staticmethod
    def find(
        x: Tensor, scorer: Scorer, choose: Chooser, at_once: bool
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Scores [p] and positions [p] of the chosen pairs; or all scores [N, M].

        Args:
            x: tokens [N, d].
            at_once: `choose` must see all tokens together.
        """
        scores = scorer(x, None)
        positions = choose(scores)
        return scores if positions is None else (scores.flatten()[positions], positions)

    @staticmethod
    def mix(codes: SparseCodes, rows: Tensor) -> Tensor:
        """Z W: rows [M, d] -> [N, d]."""
        return codes.dense().flatten(0, -2).to(rows.dtype) @ rows

    @staticmethod
    def sample(codes: SparseCodes, x: Tensor, rows: Tensor) -> Tensor:
        """X W^T at the pairs: x [N, d], rows [M, d] -> [p]."""
        return (x @ rows.T).flatten()[codes.positions]

    @staticmethod
    def accumulate(codes: SparseCodes, x: Tensor) -> Tensor:
        """Z^T X: x [N, d] -> [M, d]."""
        return codes.dense().flatten(0, -2).to(x.dtype).T @ x


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


def backend(like: Tensor) -> type[Reference]:
    """What computes the operations on a tensor's device."""
    return CPU if like.device.type == "cpu" else Reference


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
        order, begin = _sorted_by(codes.latent, codes.latents)
        return order, codes.token[order], begin

    return codes.derived("by latent", make)


def _by_tile(codes: SparseCodes) -> tuple[Tensor, Tensor, Tensor]:
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
    # Detached: where rows require a gradient, embedding_bag prepares its backward pass, too.
    return embedding_bag(
        index,
        rows.detach(),
        begin,
        mode="sum",
        per_sample_weights=weights.detach(),
        include_last_offset=True,
    )

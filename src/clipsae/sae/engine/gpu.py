"""The operations on CUDA, as Triton kernels, without a wait for the device.

How many latents act is known to the device alone. So codes have a fixed amount of memory, as much
as there are pairs where dense products become faster (`PaddedCodes`); a training step looks at the
number when all of its forward pass is queued, and repeats it in dense products if there were more.

    scores [N, M] -> a lower bound of each token's threshold (but for a plain threshold)
                  -> compact: the scores above it, in a list for each token
                  -> the exact threshold, of the list
                  -> pack: what is above that, one list after another: `Rows` -> `PaddedCodes`
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from math import ceil
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from clipsae.sae.codes import SparseCodes
from clipsae.sae.dense import at_least_float32
from clipsae.sae.engine import kernels
from clipsae.sae.engine.reference import (
    Found,
    Reference,
    Scorer,
    Share,
    below_largest,
    placed,
    rounded_down,
)

BLOCK = 2048  # scores that a program has in registers
ROOM = 2048  # pairs of a token's list
TOKENS = 2048  # whose scores are in memory together, where the number of codes is read
NEWTON = 6  # steps to the lower bound
NEWTON_MOST = 64  # to tau: enough for 2^38 latents, see `kernels.sparsemax`


class PaddedCodes(SparseCodes):
    """Codes [N, M] whose number only the device knows: their memory is longer than they are.

    What is beyond them has position 0 and value 0, whatever is computed from the values.

    Args:
        begin: where each token's pairs begin, LongTensor [N + 1].
        total: how many codes there would be, a scalar on the device; None: there is room for all.
    """

    def __init__(
        self,
        values: Tensor,
        positions: Tensor,
        shape: tuple[int, ...],
        begin: Tensor,
        total: Tensor | None = None,
    ) -> None:
        super().__init__(values, positions, shape)
        self.begin = begin
        self.total = total

    def with_values(self, values: Tensor) -> "PaddedCodes":
        return self.paired(torch.where(self.real, values, 0))

    def view(self, *shape: int) -> "PaddedCodes":
        new = self.paired(self.values)
        new.shape = (self.tokens, *shape[1:]) if shape[0] == -1 else shape
        return new

    def paired(self, values: Tensor) -> "PaddedCodes":
        new = PaddedCodes(values, self.positions, self.shape, self.begin, self.total)
        new._derived = self._derived
        return new

    @property
    def real(self) -> Tensor:
        """Which of the pairs are codes, BoolTensor [p]."""

        def make() -> Tensor:
            return torch.arange(len(self.positions), device=self.begin.device) < self.begin[-1]

        return self.derived("real", make)

    def exact(self) -> SparseCodes:
        """Without what is beyond them; waits for the device."""
        count = int(self.begin[-1])
        return SparseCodes(self.values[:count], self.positions[:count], self.shape)

    def overflows(self, world_size: int = 1) -> Callable[[], bool]:
        return (
            super().overflows()
            if self.total is None
            else _Look(self.total, len(self.positions), world_size)
        )

    def dense(self) -> Tensor:
        flat = self.values.new_zeros(self.tokens * self.latents)
        return flat.scatter_add(0, self.positions, self.values).view(self.shape)

    def at_latent(self, numbers: Tensor) -> Tensor:
        return _Spread.apply(numbers, self.latent, self.lists_by_latent)

    def at_token(self, numbers: Tensor) -> Tensor:
        return _Spread.apply(numbers, self.token, self.lists_by_token)

    def sum_tokens(self, values: Tensor) -> Tensor:
        return _Sums.apply(values, self.latent, self.lists_by_latent)

    def sum_latents(self, values: Tensor) -> Tensor:
        return _Sums.apply(values, self.token, self.lists_by_token)

    def sizes(self) -> Tensor:
        return self.begin.diff()

    def count(self, where: Tensor | None = None) -> Tensor:
        where = (self.values != 0 if where is None else where) & self.real
        if len(self.shape) > 2:
            return super().count(where)
        return self.sum_tokens(where.float()).long()  # (exact up to 2^24 tokens)

    def ranks(self) -> Tensor:
        # What is beyond the codes is of no token: it comes after all.
        token = torch.where(self.real, self.token, self.tokens)
        by_size = self.values.detach().abs().argsort(descending=True, stable=True)
        order = by_size[token[by_size].argsort(stable=True)]
        place = torch.arange(len(order), device=order.device) - self.begin[token[order]]
        return torch.empty_like(place).index_copy_(0, order, place)

    def in_parts(self, by: Tensor, edges: Sequence[int]) -> "PaddedCodes":
        part, parts = self._part(by, edges), len(edges) + 1
        cell = torch.where(self.real, self.token * parts + part, self.tokens * parts)
        ordered, order = torch.sort(cell, stable=True)
        cells = torch.arange(self.tokens * parts + 1, device=cell.device)
        positions = torch.where(self.real, ordered * self.latents + self.latent[order], 0)
        shape = (self.tokens, parts, self.latents)
        begin = torch.searchsorted(ordered, cells)
        return PaddedCodes(self.values[order], positions, shape, begin, self.total)

    def lookup(self, latents: Tensor) -> Tensor:
        return self.exact().lookup(latents)

    def __getitem__(self, index: int | slice | Tensor) -> SparseCodes:
        return self.exact()[index]

    def compact(self) -> SparseCodes:
        return self.exact().compact()

    def csr(self) -> Tensor:
        return self.exact().csr()

    @property
    def lists_by_token(self) -> "Lists":
        """Each token's pairs."""
        return self.derived("lists by token", lambda: Lists(self.begin, self.latent, None))

    @property
    def lists_by_latent(self) -> "Lists":
        """Each latent's pairs, tokens ascending."""

        def make() -> Lists:
            latent = torch.where(self.real, self.latent, self.latents).int()
            ordered, order = torch.sort(latent, stable=True)
            edges = torch.arange(self.latents + 1, device=latent.device, dtype=torch.int32)
            return Lists(torch.searchsorted(ordered, edges), self.token[order], order)

        return self.derived("lists by latent", make)


@dataclass(frozen=True)
class Lists:
    """Pairs one list after another: where each list begins [S + 1], the other index of each pair
    [p], and the pairs' places in the codes [p] (None: as they are)."""

    begin: Tensor
    index: Tensor
    order: Tensor | None

    def values(self, values: Tensor) -> Tensor:
        """Of the codes' values [p], in the lists' order."""
        return (values if self.order is None else values[self.order]).contiguous()

    def mix(self, values: Tensor, rows: Tensor) -> Tensor:
        """Rows [., d] of the index, weighted and summed over each list: [S, d]."""
        out = rows.new_empty(len(self.begin) - 1, rows.shape[1])
        weights = self.values(values.to(rows.dtype))
        block = _columns(rows.shape[1])
        grid = (len(out), ceil(rows.shape[1] / block))
        _launch(
            kernels.mix,
            *(grid, self.begin, self.index, weights, rows.contiguous(), out, rows.shape[1]),
            PAIRS=16,
            BLOCK=block,
        )
        return out

    def sums(self, values: Tensor) -> Tensor:
        """Of each list's values: [S]. Half precision is summed in float32."""
        wide = at_least_float32(values)
        out = wide.new_empty(len(self.begin) - 1)
        _launch(kernels.sums, (len(out),), self.begin, self.values(wide), out, BLOCK=128)
        return out.to(values.dtype)


class _Spread(torch.autograd.Function):
    """Numbers of latents [M] or tokens [N] at their pairs [p]. (The gradient of torch's own adds up
    in an order that changes.)"""

    @staticmethod
    def forward(ctx: Any, numbers: Tensor, index: Tensor, lists: Lists) -> Tensor:
        ctx.lists = lists
        return numbers.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return ctx.lists.sums(gradient), None, None


class _Sums(torch.autograd.Function):
    """Values [p] summed for each latent [M] or token [N]."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, index: Tensor, lists: Lists) -> Tensor:
        ctx.save_for_backward(index)
        return lists.sums(values)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return gradient.index_select(0, ctx.saved_tensors[0]), None, None


@dataclass(frozen=True)
class Rows(Found):
    """Where codes may be, before it is packed: what the kernels' passes over scores [N, M] found.

    Attributes:
        scores: [N, M]; zeroed: BoolTensor [M] or None, latents whose scores count as 0.
        lists, ids, counts: of each token, what may be kept of its scores: see `kernels`.
        floor: kept is what is above it ([N, M], expanded), and of what is equal to it the first
            `places` [N] of each token.
        sizes: how much that is, [N].
        most: pairs in all, where that is known; None: any number.
    """

    scores: Tensor
    zeroed: Tensor | None
    lists: Tensor
    ids: Tensor
    counts: Tensor
    floor: Tensor
    sizes: Tensor
    places: Tensor | None = None
    most: int | None = None

    def pack(self, room: int | None = None) -> PaddedCodes:
        """The scores that are kept, as codes [N, M].

        Args:
            room: pairs that there is memory for, if their number is not known; None: read it.
        """
        n, m = self.scores.shape
        begin = nn.functional.pad(self.sizes.cumsum(0, dtype=torch.int64), (1, 0))
        total = None
        if self.most is not None:
            room = self.most
        elif room is None:
            room = int(begin[-1])
        else:
            total, begin = begin[-1], begin.clamp(max=room)
        values = self.scores.new_zeros(room)
        positions = torch.zeros(room, dtype=torch.int64, device=values.device)
        places = torch.zeros_like(self.sizes[:1]) if self.places is None else self.places
        _launch(
            kernels.pack,
            *((n,), self.scores, self.zeroed, self.floor, places, self.lists, self.ids),
            *(self.counts, begin, values, positions, m),
            *self.floor.stride(),
            *(int(self.places is not None), room),
            **_constants(self.zeroed),
            ROOM=ROOM,
        )
        return PaddedCodes(values, positions, (n, m), begin, total)


class _Look:
    """Whether there are more than `room` codes on any rank: asked of the device when made, and
    answered when it has come so far. What is queued in the meantime keeps it busy."""

    def __init__(self, total: Tensor, room: int, world_size: int) -> None:
        self.room = room
        if world_size > 1:  # all ranks go the same way
            total = total.clone()
            dist.all_reduce(total, dist.ReduceOp.MAX)
        self.event: Any = None
        self.total = total
        if total.device.type == "cuda":
            self.total = torch.empty((), dtype=total.dtype, pin_memory=True)
            self.total.copy_(total, non_blocking=True)
            self.event = torch.cuda.Event()
            self.event.record(torch.cuda.current_stream(total.device))

    def __call__(self) -> bool:
        if self.event is not None:
            self.event.synchronize()
        return int(self.total) > self.room


class GPU(Reference):
    """The operations as kernels."""

    waits = False

    # --- find: which pairs ---

    @staticmethod
    def above(scores: Tensor, floor: Tensor, by: Tensor | None = None) -> Rows | PaddedCodes:
        if by is not None and by is not scores:
            rows = GPU.above(by, floor)
            assert isinstance(rows, Rows)
            found = rows.pack()
            return found.with_values(scores.flatten()[found.positions])
        scores = scores.contiguous()
        floor = at_least_float32(rounded_down(floor, scores)).expand_as(scores)
        lists, ids, counts = _compacted(scores, None, floor)
        return Rows(scores, None, lists, ids, counts, floor, counts)

    @staticmethod
    def largest(scores: Tensor, k: int, by: Tensor | None = None) -> Rows | PaddedCodes:
        if by is not None:
            rows = GPU.largest(by, k)
            assert isinstance(rows, Rows)
            found = rows.pack()
            return found.with_values(scores.flatten()[found.positions])
        scores = scores.contiguous()
        n, m = scores.shape
        bound = at_least_float32(scores[:0]).new_full((n, 1), -torch.inf)
        bits = 63 if bound.dtype == torch.float64 else 31
        if 2 * k <= BLOCK < m:
            _launch(
                kernels.largest_bound,
                *((n,), scores, None, bound, m, k),
                **_constants(None),
                BITS=bits,
            )
            # Those that are equal to it may be kept.
            bound = torch.nextafter(bound, torch.full_like(bound, -torch.inf))
        lists, ids, counts = _compacted(scores, None, bound.expand_as(scores))
        border, places = torch.empty_like(bound), torch.empty_like(counts)
        _launch(
            kernels.largest,
            *((n,), scores, None, lists, ids, counts, border, places, m, k),
            **_constants(None),
            ROOM=ROOM,
            BITS=bits,
        )
        sizes = counts.clamp(max=k)  # scores of -inf are none
        floor = border.expand_as(scores)
        return Rows(scores, None, lists, ids, counts, floor, sizes, places, most=n * k)

    @staticmethod
    def largest_of_all(scores: Tensor, count: int, share: Share) -> PaddedCodes:
        floor, room = below_largest(scores, count)
        rows = GPU.above(scores, floor)
        assert isinstance(rows, Rows)
        found = rows.pack(room)
        values = torch.where(found.real, at_least_float32(found.values), -torch.inf)
        ranked = values.topk(min(count, room)).values
        here = share(values)
        if isinstance(here, int):
            here = torch.full((), here, device=values.device)
        kept = torch.minimum(here, found.begin[-1])
        last = ranked.index_select(0, (kept - 1).clamp(min=0).view(1))
        least = torch.where(kept > 0, last, torch.inf)
        equal = found.real & (values == least)
        places = kept - (values > least).sum()
        chosen = (values > least) | (equal & (equal.cumsum(0) <= places))
        return _selected(found, chosen, len(ranked))

    @staticmethod
    def sparsemax(scores: Tensor, zeroed: Tensor | None = None) -> Rows:
        return _sparsemax(scores, zeroed)[1]

    @staticmethod
    def sparsemax_threshold(scores: Tensor) -> Tensor:
        return _sparsemax(scores, None)[0]

    @classmethod
    def find(
        cls,
        x: Tensor,
        scorer: Scorer,
        choose: Callable[[Tensor], Any],
        *,
        most: int,
        at_once: bool = False,
        wait: bool = True,
    ) -> Tensor | SparseCodes:
        """In one piece, as codes that may be padded; with `wait` some tokens at a time."""
        block = max(1, min(len(x), TOKENS) if wait and not at_once else len(x))
        parts = []
        for start in range(0, max(1, len(x)), block):
            scores = scorer(x[start : start + block], None)
            chosen = choose(scores) if len(x) else scores.new_empty(0, dtype=torch.int64)
            if chosen is None:
                return scores if block >= len(x) else scorer(x, None)
            if isinstance(chosen, Rows):
                chosen = chosen.pack(None if wait else most)
            elif isinstance(chosen, Tensor):  # an activation's own, in any order
                chosen = chosen.sort().values
            found = placed(scores, chosen)
            if not wait:
                return _padded(found)
            parts.append(found.exact() if isinstance(found, PaddedCodes) else found)
        m = scores.shape[1]
        values = torch.cat([part.values for part in parts])
        positions = [part.positions + i * block * m for i, part in enumerate(parts)]
        if len(values) > most:
            return scorer(x, None)
        return SparseCodes(values, torch.cat(positions), (len(x), m))

    # --- products ---

    @staticmethod
    def mix(codes: SparseCodes, rows: Tensor) -> Tensor:
        return _padded(codes).lists_by_token.mix(codes.values, rows)

    @staticmethod
    def sample(codes: SparseCodes, x: Tensor, rows: Tensor) -> Tensor:
        lists = _padded(codes).lists_by_token
        out, d = rows.new_zeros(len(codes.positions)), rows.shape[1]
        _launch(
            kernels.sample,
            *((codes.tokens,), lists.begin, lists.index, x.contiguous(), rows.contiguous(), out, d),
            PAIRS=16,
            BLOCK=_columns(d),
        )
        return (
            out if lists.order is None else torch.empty_like(out).index_copy_(0, lists.order, out)
        )

    @staticmethod
    def accumulate(codes: SparseCodes, x: Tensor) -> Tensor:
        return _padded(codes).lists_by_latent.mix(codes.values, x)


def _sparsemax(scores: Tensor, zeroed: Tensor | None) -> tuple[Tensor, Rows]:
    """tau [N, 1], float64, and what is above it."""
    scores = scores.contiguous()
    n, m = scores.shape
    bound = at_least_float32(scores[:0]).new_empty(n, 1)
    _launch(
        kernels.sparsemax_bound,
        *((n,), scores, zeroed, bound, m),
        **_constants(zeroed),
        EPS=torch.finfo(bound.dtype).eps,
        STEPS=NEWTON,
    )
    lists, ids, counts = _compacted(scores, zeroed, bound.expand_as(scores))
    tau = torch.empty(n, 1, dtype=torch.float64, device=scores.device)
    sizes = torch.empty_like(counts)
    _launch(
        kernels.sparsemax,
        *((n,), scores, zeroed, lists, ids, counts, bound, tau, sizes, m),
        **_constants(zeroed),
        ROOM=ROOM,
        STEPS=NEWTON_MOST,
    )
    floor = at_least_float32(rounded_down(tau, scores)).expand_as(scores)
    return tau, Rows(scores, zeroed, lists, ids, counts, floor, sizes)


def _compacted(
    scores: Tensor, zeroed: Tensor | None, floor: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The list of each token: scores above the floor [N, M], [N, ROOM], their latents, how many,
    [N]."""
    n, m = scores.shape
    lists = at_least_float32(scores[:0]).new_empty(n, ROOM)
    ids = torch.empty(n, ROOM, dtype=torch.int32, device=scores.device)
    counts = torch.empty(n, dtype=torch.int32, device=scores.device)
    _launch(
        kernels.compact,
        *((n,), scores, zeroed, floor, lists, ids, counts, m),
        *floor.stride(),
        **_constants(zeroed),
        ROOM=ROOM,
    )
    return lists, ids, counts


def _constants(zeroed: Tensor | None) -> dict[str, Any]:
    return {"BLOCK": BLOCK, "ZEROED": zeroed is not None}


def _columns(d: int) -> int:
    """Numbers of a row that a program has in registers."""
    return min(256, 1 << (d - 1).bit_length())


def _launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    if 0 in grid:
        return
    device = arguments[0].device
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        kernel[grid](*arguments, **constants)


def _padded(codes: SparseCodes) -> PaddedCodes:
    """The same pairs; of codes without padding, with each token's beginning."""
    if isinstance(codes, PaddedCodes):
        return codes

    def make() -> PaddedCodes:
        token, order = torch.sort(codes.token, stable=True)
        edges = torch.arange(codes.tokens + 1, device=token.device, dtype=token.dtype)
        begin = torch.searchsorted(token, edges)
        flat = (codes.tokens, codes.latents)
        padded = PaddedCodes(codes.values.detach(), codes.positions.long(), flat, begin)
        padded.derived("lists by token", lambda: Lists(begin, padded.latent[order], order))
        return padded

    return codes.derived("padded", make)


def _selected(codes: PaddedCodes, kept: Tensor, most: int) -> PaddedCodes:
    """The codes that are kept, BoolTensor [p], no more than `most`."""
    before = nn.functional.pad(kept.cumsum(0), (1, 0))
    to = torch.where(kept, before[1:] - 1, most)
    positions = codes.positions.new_zeros(most + 1).scatter(0, to, codes.positions)[:most]
    values = codes.values.new_zeros(most + 1).scatter(0, to, codes.values)[:most]
    begin = before[codes.begin]
    real = torch.arange(most, device=begin.device) < begin[-1]
    positions, values = torch.where(real, positions, 0), torch.where(real, values, 0)
    # Those that there was no room for may be among the largest: then any number above the room.
    total = None if codes.total is None else (codes.total > len(codes.positions)) * (most + 1)
    return PaddedCodes(values, positions, codes.shape, begin, total)

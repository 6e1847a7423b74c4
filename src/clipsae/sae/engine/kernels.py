"""The Triton kernels of `clipsae.sae.engine.gpu`: one program a token, a few lines each.

A row of 49,152 scores is too long for registers: kernels walk through it in chunks of `BLOCK`. What
a row keeps goes to its own list of `ROOM` entries; a row that keeps more is walked through again
wherever its list would have been read. So every kernel is right for any number of active latents.

No atomics: sums have one order, and two runs agree bit for bit. Nothing of libdevice: all of it
runs under TRITON_INTERPRET=1 on a CPU, too.
"""

import triton
import triton.language as tl


@triton.jit
def _wide(x):
    """float32, or float64 where it is."""
    return x if x.dtype == tl.float64 else x.to(tl.float32)


@triton.jit
def _chunk(scores, zeroed, row, start, latents, BLOCK: tl.constexpr, ZEROED: tl.constexpr):
    """Scores of a row from `start` on: values, their latents, and which of them exist."""
    latent = start + tl.arange(0, BLOCK)
    exists = latent < latents
    s = _wide(tl.load(scores + row * latents + latent, mask=exists, other=float("-inf")))
    if ZEROED:
        s = tl.where(tl.load(zeroed + latent, mask=exists, other=0) != 0, 0.0, s)
    return s, latent, exists


@triton.jit
def _listed(lists, ids, row, start, count, BLOCK: tl.constexpr, ROOM: tl.constexpr):
    """The same of a row's list."""
    at = start + tl.arange(0, BLOCK)
    exists = at < count
    s = tl.load(lists + row * ROOM + at, mask=exists, other=float("-inf"))
    return s, tl.load(ids + row * ROOM + at, mask=exists, other=0), exists


@triton.jit
def _group_maxima(scores, zeroed, row, latents, BLOCK: tl.constexpr, ZEROED: tl.constexpr):
    """The maxima of BLOCK groups: m, m + BLOCK, m + 2 BLOCK, ..."""
    best, _, _ = _chunk(scores, zeroed, row, 0, latents, BLOCK, ZEROED)
    for start in range(BLOCK, latents, BLOCK):
        s, _, _ = _chunk(scores, zeroed, row, start, latents, BLOCK, ZEROED)
        best = tl.maximum(best, s)
    return best


# --- which latents of a token: a lower bound, then a list of what is above it ---


@triton.jit
def sparsemax_bound(
    scores, zeroed, bound, latents,
    BLOCK: tl.constexpr, ZEROED: tl.constexpr, EPS: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """A number below sparsemax's tau of each row: Newton's steps for the groups' maxima alone, as
    the tau of a part of the scores is never above that of all."""
    row = tl.program_id(0).to(tl.int64)
    best = _group_maxima(scores, zeroed, row, latents, BLOCK, ZEROED)
    top = tl.max(best, axis=0)
    below = best - top  # <= 0; tau is between top - 1 and top
    tau = top * 0 - 1
    for _ in range(STEPS):
        above = below > tau
        size = tl.sum(above.to(below.dtype), axis=0)
        step = (tl.sum(tl.where(above, below, 0), axis=0) - 1) / tl.maximum(size, 1)
        tau = tl.maximum(tau, step)
    # What rounding may have added.
    tl.store(bound + row, top + tau - EPS * (64 + 4 * tl.abs(top)))


@triton.jit
def _ordered(s):
    """Numbers as whole numbers of the same order, -0 and 0 as the same one."""
    s = tl.where(s == 0, 0.0, s)
    if s.dtype == tl.float64:
        bits = s.to(tl.int64, bitcast=True)
        key = bits ^ ((bits >> 63) & 0x7FFFFFFFFFFFFFFF)
    else:
        bits = s.to(tl.int32, bitcast=True)
        key = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64)
    return key


@triton.jit
def _number(key, like):
    """The inverse of `_ordered`, in the type of `like`."""
    if like.dtype == tl.float64:
        s = (key ^ ((key >> 63) & 0x7FFFFFFFFFFFFFFF)).to(tl.float64, bitcast=True)
    else:
        bits = key.to(tl.int32)
        s = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
    return s


@triton.jit
def largest_bound(
    scores, zeroed, bound, latents, k,
    BLOCK: tl.constexpr, ZEROED: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    """The k-th largest of the groups' maxima, k <= BLOCK: not above the k-th largest score."""
    row = tl.program_id(0).to(tl.int64)
    best = _group_maxima(scores, zeroed, row, latents, BLOCK, ZEROED)
    keys = _ordered(best)
    zero = row * 0
    border = tl.where(
        tl.sum((keys >= 0).to(tl.int32), axis=0) >= k,
        zero,
        zero - 2 ** (BITS - 1) - 2 ** (BITS - 1),
    )
    for i in range(BITS):
        higher = border + (zero + 1 << (BITS - 1 - i))
        enough = tl.sum((keys >= higher).to(tl.int32), axis=0) >= k
        border = tl.where(enough, higher, border)
    tl.store(bound + row, _number(border, best))


@triton.jit
def compact(
    scores, zeroed, floor, lists, ids, counts, latents, by_token, by_latent,
    BLOCK: tl.constexpr, ROOM: tl.constexpr, ZEROED: tl.constexpr,
):  # fmt: skip
    """Each row's scores above a floor, in their order, and how many they are.

    The floor of a token and a latent is at floor[token * by_token + latent * by_latent].
    """
    row = tl.program_id(0).to(tl.int64)
    count = 0
    for start in range(0, latents, BLOCK):
        s, latent, exists = _chunk(scores, zeroed, row, start, latents, BLOCK, ZEROED)
        limit = tl.load(floor + row * by_token + latent * by_latent, mask=exists, other=0)
        above = (exists & (s > limit)).to(tl.int32)
        at = count + tl.cumsum(above, axis=0) - 1
        fits = (above != 0) & (at < ROOM)
        tl.store(lists + row * ROOM + at, s, mask=fits)
        tl.store(ids + row * ROOM + at, latent, mask=fits)
        count += tl.sum(above, axis=0)
    tl.store(counts + row, count)


# --- exactly which, from the lists ---


@triton.jit
def _count_and_sum(
    scores, zeroed, lists, ids, row, count, latents, tau,
    BLOCK: tl.constexpr, ROOM: tl.constexpr, ZEROED: tl.constexpr,
):  # fmt: skip
    """How many scores of a row are above tau, and their sum, float64."""
    size = count * 0
    total = tau * 0
    if count <= ROOM:
        for start in range(0, count, BLOCK):
            s, _, exists = _listed(lists, ids, row, start, count, BLOCK, ROOM)
            wide = s.to(tl.float64)
            above = exists & (wide > tau)
            size += tl.sum(above.to(tl.int32), axis=0)
            total += tl.sum(tl.where(above, wide, 0), axis=0)
    else:
        for start in range(0, latents, BLOCK):
            s, _, exists = _chunk(scores, zeroed, row, start, latents, BLOCK, ZEROED)
            wide = s.to(tl.float64)
            above = exists & (wide > tau)
            size += tl.sum(above.to(tl.int32), axis=0)
            total += tl.sum(tl.where(above, wide, 0), axis=0)
    return size, total


@triton.jit
def sparsemax(
    scores, zeroed, lists, ids, counts, bound, taus, sizes, latents,
    BLOCK: tl.constexpr, ROOM: tl.constexpr, ZEROED: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """tau of each row, and how many scores are above it, by Newton's steps from a lower bound.

    With f = (sum of s - tau above tau) - 1 and c their number, a step is tau += f / c. f is convex:
    f' / f + c' / c <= 1 for the next step's f' and c', so f c falls to a quarter or less. It begins
    at M^2 or less, and below 2^-52 a step is below rounding: log2(M) + 26 steps are enough.
    """
    row = tl.program_id(0).to(tl.int64)
    count = tl.load(counts + row)
    tau = tl.load(bound + row).to(tl.float64)
    before = count * 0 - 1
    size, total = _count_and_sum(
        scores, zeroed, lists, ids, row, count, latents, tau, BLOCK, ROOM, ZEROED
    )
    step = count * 0
    while (size != before) & (step < STEPS):
        before = size
        tau = tl.maximum(tau, (total - 1) / tl.maximum(size, 1))
        size, total = _count_and_sum(
            scores, zeroed, lists, ids, row, count, latents, tau, BLOCK, ROOM, ZEROED
        )
        step += 1
    tl.store(taus + row, tau)
    tl.store(sizes + row, size)


@triton.jit
def _count_from(
    scores, zeroed, lists, ids, row, count, latents, border,
    BLOCK: tl.constexpr, ROOM: tl.constexpr, ZEROED: tl.constexpr,
):  # fmt: skip
    """How many scores of a row have a key of `border` or more."""
    size = count * 0
    if count <= ROOM:
        for start in range(0, count, BLOCK):
            s, _, exists = _listed(lists, ids, row, start, count, BLOCK, ROOM)
            size += tl.sum((exists & (_ordered(s) >= border)).to(tl.int32), axis=0)
    else:
        for start in range(0, latents, BLOCK):
            s, _, exists = _chunk(scores, zeroed, row, start, latents, BLOCK, ZEROED)
            size += tl.sum((exists & (_ordered(s) >= border)).to(tl.int32), axis=0)
    return size


@triton.jit
def largest(
    scores, zeroed, lists, ids, counts, borders, places, latents, k,
    BLOCK: tl.constexpr, ROOM: tl.constexpr, ZEROED: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    """The k-th largest score of each row, bit by bit, and how many equal to it are among the k.

    Of a row with fewer above -inf, -inf.
    """
    row = tl.program_id(0).to(tl.int64)
    count = tl.load(counts + row)
    zero = row * 0
    size = _count_from(scores, zeroed, lists, ids, row, count, latents, zero, BLOCK, ROOM, ZEROED)
    border = tl.where(size >= k, zero, zero - 2 ** (BITS - 1) - 2 ** (BITS - 1))
    for i in range(BITS):
        higher = border + (zero + 1 << (BITS - 1 - i))
        size = _count_from(
            scores, zeroed, lists, ids, row, count, latents, higher, BLOCK, ROOM, ZEROED
        )
        border = tl.where(size >= k, higher, border)
    greater = _count_from(
        scores, zeroed, lists, ids, row, count, latents, border + 1, BLOCK, ROOM, ZEROED
    )
    like, _, _ = _chunk(scores, zeroed, row, 0, latents, BLOCK, ZEROED)
    tl.store(borders + row, tl.where(count < k, float("-inf"), _number(border, like)))
    tl.store(places + row, k - greater)


@triton.jit
def pack(
    scores, zeroed, floor, places, lists, ids, counts, begin, values, positions,
    latents, by_token, by_latent, by_place, room,
    BLOCK: tl.constexpr, ROOM: tl.constexpr, ZEROED: tl.constexpr,
):  # fmt: skip
    """All rows' scores above a floor, and the first `places` of each row that are equal to it, one
    row after another: values, and positions token * M + latent. Those beyond `room` are left out.
    """
    row = tl.program_id(0).to(tl.int64)
    count = tl.load(counts + row)
    at = tl.load(begin + row)
    free = tl.load(places + row * by_place)
    if count <= ROOM:
        for start in range(0, count, BLOCK):
            s, latent, exists = _listed(lists, ids, row, start, count, BLOCK, ROOM)
            at, free = _put(
                s, latent, exists, row, floor, values, positions, latents, by_token, by_latent,
                at, free, room,
            )  # fmt: skip
    else:
        for start in range(0, latents, BLOCK):
            s, latent, exists = _chunk(scores, zeroed, row, start, latents, BLOCK, ZEROED)
            at, free = _put(
                s, latent, exists, row, floor, values, positions, latents, by_token, by_latent,
                at, free, room,
            )  # fmt: skip


@triton.jit
def _put(
    s, latent, inside, row, floor, values, positions, latents, by_token, by_latent, at, free, room
):  # fmt: skip
    limit = tl.load(floor + row * by_token + latent * by_latent, mask=inside, other=0)
    equal = (inside & (s == limit)).to(tl.int32)
    above = inside & (s > limit)
    kept = (above | ((equal != 0) & (tl.cumsum(equal, axis=0) <= free))).to(tl.int32)
    to = at + tl.cumsum(kept, axis=0) - 1
    fits = (kept != 0) & (to < room)
    tl.store(values + to, s.to(values.dtype.element_ty), mask=fits)
    tl.store(positions + to, row * latents + latent, mask=fits)
    return at + tl.sum(kept, axis=0), free - tl.minimum(free, tl.sum(equal, axis=0))


# --- products ---


@triton.jit
def mix(begin, index, weights, rows, out, d, PAIRS: tl.constexpr, BLOCK: tl.constexpr):
    """Rows [., d] mixed: out[i] = the sum over pairs begin[i] ... begin[i + 1] of weight * row.

    Codes times the dictionary, and with the pairs sorted by latent, the dictionary's gradient.
    """
    i = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    first, last = tl.load(begin + i), tl.load(begin + i + 1)
    total = tl.zeros([BLOCK], dtype=out.dtype.element_ty)
    for start in range(first, last, PAIRS):
        pair = start + tl.arange(0, PAIRS)
        inside = pair < last
        row = tl.load(index + pair, mask=inside, other=0).to(tl.int64)
        weight = tl.load(weights + pair, mask=inside, other=0)
        mask = inside[:, None] & (column < d)[None, :]
        part = tl.load(rows + row[:, None] * d + column[None, :], mask=mask, other=0)
        total += tl.sum(weight[:, None] * part, axis=0)
    tl.store(out + i * d + column, total, mask=column < d)


@triton.jit
def sample(begin, latent, x, rows, out, d, PAIRS: tl.constexpr, BLOCK: tl.constexpr):
    """The product of each pair's token x [N, d] and row [M, d]."""
    token = tl.program_id(0).to(tl.int64)
    first, last = tl.load(begin + token), tl.load(begin + token + 1)
    for start in range(first, last, PAIRS):
        pair = start + tl.arange(0, PAIRS)
        inside = pair < last
        row = tl.load(latent + pair, mask=inside, other=0).to(tl.int64)
        total = tl.zeros([PAIRS], dtype=out.dtype.element_ty)
        for left in range(0, d, BLOCK):
            column = left + tl.arange(0, BLOCK)
            mask = inside[:, None] & (column < d)[None, :]
            part = tl.load(rows + row[:, None] * d + column[None, :], mask=mask, other=0)
            own = tl.load(x + token * d + column, mask=column < d, other=0)
            total += tl.sum(part * own[None, :], axis=1)
        tl.store(out + pair, total, mask=inside)


@triton.jit
def sums(begin, values, out, BLOCK: tl.constexpr):
    """out[i] = the sum of values begin[i] ... begin[i + 1]."""
    i = tl.program_id(0).to(tl.int64)
    first, last = tl.load(begin + i), tl.load(begin + i + 1)
    total = tl.zeros([BLOCK], dtype=out.dtype.element_ty)
    for start in range(first, last, BLOCK):
        at = start + tl.arange(0, BLOCK)
        total += tl.load(values + at, mask=at < last, other=0)
    tl.store(out + i, tl.sum(total, axis=0))

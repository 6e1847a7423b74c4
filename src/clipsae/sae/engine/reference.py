"""Every operation as its formula, in dense torch: what the backends of all devices compute.

N tokens, M latents, p pairs of a token and a latent.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from clipsae.sae.codes import SparseCodes
from clipsae.sae.dense import at_least_float32

Scorer = Callable[[Tensor, Tensor | None], Tensor]
"""Tokens [n, d] and memory to use again -> scores [n, M]."""

Share = Callable[[Tensor], "int | Tensor"]
"""Values [p] -> how many of them are kept, the largest."""


class Found:
    """Where codes may be, in a backend's own form, of which its `find` makes codes."""


Chosen = Tensor | SparseCodes | Found | None
"""Where codes may be: LongTensor [p], token * M + latent; these with their scores; a backend's own
form; None: dense products are faster."""


class Reference:
    """The operations on any device, each as one formula."""

    waits = True
    """Whether the host reads how many codes a training step has."""

    # --- 1. find: which pairs, and their scores ---

    @staticmethod
    def above(scores: Tensor, floor: Tensor, by: Tensor | None = None) -> Chosen:
        """Scores [N, M] above a floor: [N, 1], [M] or a scalar; or where `by` [N, M] is."""
        return above(scores if by is None else by, floor).flatten().nonzero()[:, 0]

    @staticmethod
    def largest(scores: Tensor, k: int, by: Tensor | None = None) -> Chosen:
        """The k largest of each token's scores [N, M]; `by` other numbers [N, M], if given."""
        columns = (scores if by is None else by).topk(k, dim=-1, sorted=False).indices
        return (columns + scores.shape[1] * _column(scores)).flatten()

    @staticmethod
    def largest_of_all(scores: Tensor, count: int, share: Share) -> Chosen:
        """Of the `count` largest of all scores [N, M] those above 0, and of these the largest.

        Args:
            share: how many of them; it is given at least all those.
        """
        values, positions = scores.flatten().topk(min(count, scores.numel()))
        return positions[: int(share(values))]

    @staticmethod
    def sparsemax(scores: Tensor, zeroed: Tensor | None = None) -> Chosen:
        """Scores [N, M] above sparsemax's threshold.

        Args:
            zeroed: BoolTensor [M], latents whose scores count as 0. Scores are overwritten there.
        """
        if zeroed is not None:
            scores.masked_fill_(zeroed, 0)
        return above(scores, newton(scores)).flatten().nonzero()[:, 0]

    @staticmethod
    def sparsemax_threshold(scores: Tensor) -> Tensor:
        """Scores [N, M] -> tau [N, 1], float64."""
        return newton(scores)

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
        """The scores of the chosen pairs, as codes [N, M]; or all scores [N, M].

        Args:
            x: tokens [N, d].
            choose: scores -> what one of the operations above returned.
            most: pairs above which dense products are faster.
            at_once: it must see all tokens together.
            wait: for their number, where a device computes it; see `SparseCodes.overflows`.
        """
        scores = scorer(x, None)
        chosen = choose(scores)
        return scores if chosen is None else placed(scores, chosen)

    # --- 2. mix, 3. sample, 4. accumulate ---

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


def _column(scores: Tensor) -> Tensor:
    return torch.arange(len(scores), device=scores.device)[:, None]


def placed(scores: Tensor, chosen: Chosen) -> SparseCodes:
    """The scores [N, M] at positions [p]."""
    if isinstance(chosen, SparseCodes):
        return chosen
    assert isinstance(chosen, Tensor)
    return SparseCodes(scores.flatten().index_select(0, chosen), chosen, tuple(scores.shape))


def above(scores: Tensor, floor: Tensor) -> Tensor:
    """scores > floor (broadcast), exact where the floor is float64 and the scores are not."""
    return scores > rounded_down(floor, scores)


def rounded_down(floor: Tensor, scores: Tensor) -> Tensor:
    """A float64 floor in float32, where scores have no more digits: none of them lies between the
    two, and all of them need not be made float64 to be compared."""
    if floor.dtype != torch.float64 or scores.dtype == torch.float64:
        return floor
    rounded = floor.float()
    down = torch.nextafter(rounded, torch.full_like(rounded, -torch.inf))
    return torch.where(rounded.double() > floor, down, rounded)


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


def below_largest(scores: Tensor, count: int) -> tuple[Tensor, int]:
    """A floor, a scalar of 0 or more, below the `count` largest positive scores [N, M], and how
    many scores can be above it, if few are equal to the least of these.

    The count-th largest of the maxima of 16 is a lower bound. Fewer than `count` groups have a
    larger one, so few scores are above it: 16 of each, and those that are in no group.
    """
    floor = at_least_float32(scores.new_zeros(()))
    maxima = strided_maxima(scores, 16).flatten()
    if len(maxima) < count:
        return floor, scores.numel()
    least = at_least_float32(maxima.topk(count, sorted=False).values.min())
    floor = torch.nextafter(least, torch.full_like(least, -torch.inf)).clamp(min=0)
    return floor, min(scores.numel(), 16 * count + len(scores) * (scores.shape[1] % 16))


def newton(scores: Tensor, tau: Tensor | None = None) -> Tensor:
    """tau of sparsemax of scores [N, M], float64 [N, 1]: the one number for which the sum of
    max(s - tau, 0) is 1, by Newton's steps from lower bounds (Michelot 1986).

    Args:
        tau: lower bounds [N, 1], float64; None: the largest score - 1.
    """
    if tau is None:
        tau = scores.amax(dim=-1, keepdim=True).double() - 1
    size = torch.full_like(tau, -1, dtype=torch.int64)
    while True:
        passing = scores > tau
        new_size = passing.sum(dim=-1, keepdim=True)
        if torch.equal(new_size, size):
            return tau
        size = new_size
        total = torch.where(passing, scores, 0).sum(dim=-1, keepdim=True, dtype=torch.float64)
        tau = torch.maximum(tau, (total - 1) / size.clamp(min=1))

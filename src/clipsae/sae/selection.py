"""Which scores an activation keeps: those above a threshold, or the k largest of each token.

N tokens, M latents.
"""

import torch
from torch import Tensor

from clipsae.sae.sparse_ops import prefers_dense


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

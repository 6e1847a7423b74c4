"""Which latents are strongest, and which stand for a class: deterministic, ties included."""

from torch import Tensor


def top_latents(values: Tensor, n: int) -> Tensor:
    """Indices of the n largest values of each row, [B, M] -> [B, n]; of equals the smaller first.

    `torch.topk` leaves the order of equals to the device; only rows that have some are sorted.
    """
    top = values.topk(min(n + 1, values.shape[-1]))  # one more, to see a tie at the edge
    chosen = top.indices[..., :n].clone()
    tied = (top.values[..., 1:] == top.values[..., :-1]).any(dim=-1)
    if tied.any():
        order = values[tied].sort(dim=-1, descending=True, stable=True).indices
        chosen[tied] = order[..., :n]
    return chosen


def class_ranking(counts: Tensor, sums: Tensor, n: int) -> Tensor:
    """A class's n latents: by larger count, then larger summed activation, then smaller index.

    Args:
        counts: [M], (image, token) pairs of the class on which a latent exceeded the threshold.
        sums: [M], its activation summed over all tokens of the class.

    Returns:
        LongTensor [n]: its first k are the ranking for k.
    """
    by_sum = sums.sort(descending=True, stable=True).indices
    return by_sum[counts[by_sum].sort(descending=True, stable=True).indices[:n]]

"""One batch in several processes of torch.distributed, the ranks, each with an equal part of it.

What looks at the whole batch (BatchTopK's choice, AuxK's scale) asks here what it cannot see. Every
rank must ask, in the same order. With one rank nothing is asked.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from clipsae.sae.losses import at_least_float32


def summed(values: Tensor, world_size: int) -> Tensor:
    """The sum over all ranks, without gradient through the others' values."""
    if world_size > 1:
        values = values.clone()
        dist.all_reduce(values, dist.ReduceOp.SUM)
    return values


def smallest(values: Tensor, world_size: int) -> Tensor:
    """The smallest of all ranks', element by element."""
    if world_size > 1:
        values = values.clone()
        dist.all_reduce(values, dist.ReduceOp.MIN)
    return values


def share(values: Tensor, kept: int, world_size: int) -> int:
    """How many of this rank's `values` are among the `kept` largest of all ranks'.

    Each rank sends its `kept` largest: more than those of one rank can never be among them. Where
    the last places are for equal values, the first ranks have them.

    Args:
        values: [p], without gradient. Only those above 0 are sure to be counted.
        kept: the same on all ranks.
    """
    if world_size == 1:
        return min(kept, len(values))
    mine = at_least_float32(values.new_zeros(kept))
    largest = values.topk(min(kept, len(values))).values
    mine[: len(largest)] = largest
    parts = [torch.empty_like(mine) for _ in range(world_size)]
    dist.all_gather(parts, mine)
    gathered = torch.stack(parts)
    border = gathered.flatten().topk(kept, sorted=False).values.min()
    above, equal = (gathered > border).sum(1), (gathered == border).sum(1)
    places = kept - above.sum() - (equal.cumsum(0) - equal)  # left for each rank's equal ones
    rank = dist.get_rank()
    count = above[rank] + places[rank].clamp(min=0).minimum(equal[rank])
    return min(int(count), len(values))

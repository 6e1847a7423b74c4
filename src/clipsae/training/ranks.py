"""Several processes, one SAE: its statistics over the batches of all ranks."""

import torch
import torch.distributed as dist

from clipsae.sae import SAE


@torch.no_grad()
def reduce_statistics(sae: SAE, tokens: int) -> None:
    """Make the SAE's buffers what one process would have, after each rank's forward pass.

    Counters of silent tokens are exact. Running means (Sparsemax's `frequency`) are averaged,
    which is exact for equal batches. BatchTopK chooses the k B largest of *its rank's* B tokens,
    so its inference threshold is the mean of what each rank estimates.

    Args:
        sae: the same on all ranks before the forward pass.
        tokens: of this rank's batch, the same number on all ranks.
    """
    silent = sae.tokens_since_fired
    dist.all_reduce(silent, dist.ReduceOp.MIN)  # 0 where any rank's batch fired
    silent += (silent > 0) * tokens * (dist.get_world_size() - 1)
    for buffer in sae.buffers():
        if buffer.is_floating_point():
            dist.all_reduce(buffer, dist.ReduceOp.SUM)
            buffer /= dist.get_world_size()

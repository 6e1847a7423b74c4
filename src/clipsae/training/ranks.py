"""Several processes, one SAE: its running means over the batches of all ranks."""

import torch
import torch.distributed as dist

from clipsae.sae import SAE


@torch.no_grad()
def average_statistics(sae: SAE) -> None:
    """Make the SAE's running means (Sparsemax's `frequency`) what one process would have, after
    each rank's forward pass: exact for equal batches. Counters are the SAE's own matter
    (`SAE.world_size`).

    Args:
        sae: the same on all ranks before the forward pass.
    """
    for buffer in sae.buffers():
        if buffer.is_floating_point():
            dist.all_reduce(buffer, dist.ReduceOp.SUM)
            buffer /= dist.get_world_size()

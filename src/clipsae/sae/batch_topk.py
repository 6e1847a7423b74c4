"""BatchTopK: the k B largest of the positive scores of a batch of B tokens.

Bussmann et al., "BatchTopK Sparse Autoencoders", 2024 (arXiv 2412.06410), in the form of
dictionary_learning. At inference one threshold, estimated in training, stands for the batch. The
batch is that of all ranks (`SAE.world_size`).
"""

from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn

from clipsae.sae.base import Activation
from clipsae.sae.checks import fraction, whole
from clipsae.sae.codes import SparseCodes
from clipsae.sae.dense import at_least_float32
from clipsae.sae.engine import backend
from clipsae.sae.engine.reference import Chosen
from clipsae.sae.engine.switch import prefers_dense
from clipsae.sae.registry import ACTIVATIONS


@ACTIVATIONS.register("batch_topk")
class BatchTopK(Activation):
    """z = relu(s) where s is among the k B largest; at inference where s > threshold.

    Args:
        latents: M.
        k: latents of a token on average, 1 to M.
        threshold_decay: of the moving average of the batch's smallest positive code.
        threshold_start_step: training steps before the average begins. Until then the threshold
            is the last batch's, so that an SAE that was trained for less has one, too.
    """

    by_size = True
    across_tokens = True
    full_precision = ("inference_threshold",)
    inference_threshold: Tensor
    step: Tensor

    def __init__(
        self,
        latents: int,
        *,
        k: int = 32,
        threshold_decay: float = 0.999,
        threshold_start_step: int = 1000,
    ) -> None:
        super().__init__(latents)
        whole("k", k, most=latents, most_name="latents")
        fraction("threshold_decay", threshold_decay, "0 <= decay < 1", zero=True, one=False)
        whole("threshold_start_step", threshold_start_step, least=0)
        self.k = k
        self.threshold_decay = threshold_decay
        self.threshold_start_step = threshold_start_step
        self.register_buffer("inference_threshold", torch.zeros(()))
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))

    def threshold(self, scores: Tensor) -> Tensor:
        return self.inference_threshold

    def support(self, scores: Tensor) -> Chosen:
        if prefers_dense(scores, self.k * len(scores)):
            return None
        kept = self.k * len(scores) * self.world_size
        here = partial(share, kept=kept, world_size=self.world_size)
        return backend(scores).largest_of_all(scores, kept, here)

    def forward(self, scores: Tensor | SparseCodes) -> Tensor | SparseCodes:
        if isinstance(scores, SparseCodes):
            values = torch.relu(scores.values)
            self._update(values.detach())
            return scores.with_values(values)
        flat = scores.flatten()
        kept = self.k * (len(flat) // self.latents) * self.world_size
        here = int(share(flat.detach(), kept, self.world_size))
        indices = flat.detach().topk(here, sorted=False).indices
        values = torch.relu(flat.gather(0, indices))
        self._update(values.detach())
        return torch.zeros_like(flat).scatter(0, indices, values).view_as(scores)

    @torch.no_grad()
    def _update(self, values: Tensor) -> None:
        old = self.inference_threshold
        # (In one longer than the values: there may be none.)
        positive = torch.where(values > 0, values, torch.inf)
        here = nn.functional.pad(positive, (0, 1), value=torch.inf).min().to(old.dtype)
        found = smallest(here, self.world_size)
        # (`torch.where` of two Python numbers would be float32.)
        average = self.threshold_decay * old + (1 - self.threshold_decay) * found
        new = torch.where(self.step > self.threshold_start_step, average, found)
        # A batch without a positive score leaves the threshold as it is.
        old.copy_(torch.where(found.isfinite(), new, old))
        self.step += 1


def smallest(values: Tensor, world_size: int) -> Tensor:
    """The smallest over all ranks, element by element."""
    if world_size > 1:
        values = values.clone()
        dist.all_reduce(values, dist.ReduceOp.MIN)
    return values


def share(values: Tensor, kept: int, world_size: int) -> int | Tensor:
    """How many of this rank's `values` are among the `kept` largest of all ranks'.

    Each rank sends its `kept` largest. Where equal values compete for the last places, those of
    the first ranks are kept.

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
    return count.clamp(max=len(values))

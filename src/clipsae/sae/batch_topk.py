"""BatchTopK: the k B largest of the positive scores of a batch of B tokens.

Bussmann et al., "BatchTopK Sparse Autoencoders", 2024 (arXiv 2412.06410), in the form of
dictionary_learning. At inference one threshold, estimated in training, stands for the batch.
"""

import torch
from torch import Tensor

from clipsae.sae.base import Activation
from clipsae.sae.registry import ACTIVATIONS
from clipsae.sae.topk import check_k


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

    full_precision = ("inference_threshold",)

    def __init__(
        self,
        latents: int,
        *,
        k: int = 32,
        threshold_decay: float = 0.999,
        threshold_start_step: int = 1000,
    ) -> None:
        super().__init__(latents)
        check_k(k, latents)
        if not 0 <= threshold_decay < 1:
            raise ValueError(f"threshold_decay={threshold_decay!r}: expected 0 <= decay < 1")
        if threshold_start_step < 0:
            raise ValueError(f"threshold_start_step={threshold_start_step!r}: expected 0 or more")
        self.k = k
        self.threshold_decay = threshold_decay
        self.threshold_start_step = threshold_start_step
        self.register_buffer("inference_threshold", torch.zeros(()))
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))

    def threshold(self, scores: Tensor) -> Tensor:
        return self.inference_threshold

    def forward(self, scores: Tensor) -> Tensor:
        flat = scores.flatten()
        indices = _largest(scores.detach().reshape(-1, self.latents), self.k)
        values = torch.relu(flat.gather(0, indices))
        self._update(values.detach())
        return torch.zeros_like(flat).scatter(0, indices, values).view_as(scores)

    @torch.no_grad()
    def _update(self, values: Tensor) -> None:
        old = self.inference_threshold
        smallest = torch.where(values > 0, values, torch.inf).min().to(old.dtype)
        decay = torch.where(self.step > self.threshold_start_step, self.threshold_decay, 0.0)
        new = decay * old + (1 - decay) * smallest
        # A batch without any positive score says nothing of the threshold.
        old.copy_(torch.where(smallest.isfinite(), new, old))
        self.step += 1


def _largest(scores: Tensor, k: int) -> Tensor:
    """Where the k B largest of scores [B, M] are in scores.flatten(): LongTensor [k B]."""
    flat, kept = scores.flatten(), k * len(scores)
    if scores.device.type != "cpu" or 2 * k >= scores.shape[-1]:
        return flat.topk(kept, sorted=False).indices
    # The kept-th largest of any subset is a lower bound: that of each token's 2 k largest leaves
    # few scores to choose from. (Elsewhere their number would have to be waited for.)
    some = scores.topk(2 * k, dim=-1, sorted=False).values.flatten()
    at_least = some.topk(kept, sorted=False).values.min()
    left = (flat >= at_least).nonzero()[:, 0]
    return left[flat[left].topk(kept, sorted=False).indices]

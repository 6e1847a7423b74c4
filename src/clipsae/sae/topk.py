"""TopK: the k largest of a token's positive scores.

Gao et al., "Scaling and evaluating sparse autoencoders", 2024 (arXiv 2406.04093), in the form of
dictionary_learning: z = the k largest of relu(s).
"""

import torch
from torch import Tensor

from clipsae.sae.base import Activation
from clipsae.sae.checks import whole
from clipsae.sae.codes import SparseCodes
from clipsae.sae.dense import at_least_float32
from clipsae.sae.engine.reference import Chosen, largest
from clipsae.sae.engine.switch import prefers_dense
from clipsae.sae.registry import ACTIVATIONS
from clipsae.sae.sparse_ops import largest_positions


@ACTIVATIONS.register("topk")
class TopK(Activation):
    """Training keeps exactly k (fewer where fewer are positive).

    Evaluation keeps what is above a threshold between the k-th and the (k+1)-th score: the same
    latents, except that of scores equal to the k-th all are kept. (Half-way between the two, so
    that a score that is computed again in another order of summation falls on the same side.)

    Args:
        latents: M.
        k: latents of a token, 1 to M.
    """

    by_size = True

    def __init__(self, latents: int, *, k: int = 32) -> None:
        super().__init__(latents)
        whole("k", k, most=latents, most_name="latents")
        self.k = k

    def threshold(self, scores: Tensor) -> Tensor:
        if self.k == self.latents:
            return scores.new_zeros(())
        # float32 even for half precision: there is no bfloat16 between two neighbours.
        flat = scores.reshape(-1, scores.shape[-1])
        top = at_least_float32(largest(flat, self.k + 1)[0].topk(self.k + 1, dim=-1).values)
        top = top.view(*scores.shape[:-1], self.k + 1)
        above, below = top[..., -2:-1], top[..., -1:]
        tau = below + (above - below) / 2
        tau = torch.where(tau < above, tau, below)
        tau = torch.where(
            tau < above, tau, torch.nextafter(above, torch.full_like(above, -torch.inf))
        )
        return tau.clamp(min=0)

    def magnitude(self, scores: Tensor, tau: Tensor, latents: Tensor | None) -> Tensor:
        return torch.relu(scores)

    def support(self, scores: Tensor) -> Chosen:
        if prefers_dense(scores, self.k * len(scores)):
            return None
        return largest_positions(scores, self.k)

    def forward(self, scores: Tensor | SparseCodes) -> Tensor | SparseCodes:
        if isinstance(scores, SparseCodes):
            return scores.with_values(torch.relu(scores.values))
        values, indices = scores.topk(self.k, dim=-1, sorted=False)
        return torch.zeros_like(scores).scatter(-1, indices, torch.relu(values))

"""AbsTopK: the k scores of a token that are farthest from 0, with their signs.

Zhu et al., "AbsTopK: Rethinking Sparse Autoencoders For Bidirectional Features", 2025 (arXiv
2510.00404): one step of proximal gradient descent under a limit on the number of codes alone. A
latent can then stand for a direction and for its opposite.
"""

import torch
from torch import Tensor

from clipsae.sae.codes import SparseCodes
from clipsae.sae.engine.reference import Chosen
from clipsae.sae.engine.switch import prefers_dense
from clipsae.sae.registry import ACTIVATIONS
from clipsae.sae.sparse_ops import largest_positions
from clipsae.sae.topk import TopK


@ACTIVATIONS.register("abs_topk")
class AbsTopK(TopK):
    """z = s where |s| is among a token's k largest; in evaluation where |s| is above a threshold,
    which is between the k-th and the (k+1)-th, as TopK's.

    A negative code is a code: it counts in L0. What looks for the tokens on which a latent is
    active (classes, pictures, scores of concepts) looks at positive codes.

    Args:
        latents: M.
        k: latents of a token, 1 to M.
    """

    def __init__(self, latents: int, *, k: int = 32) -> None:
        super().__init__(latents, k=k)

    def strength(self, scores: Tensor) -> Tensor:
        return scores.abs()

    def threshold(self, scores: Tensor) -> Tensor:
        return super().threshold(scores.abs())

    def magnitude(self, scores: Tensor, tau: Tensor, latents: Tensor | None) -> Tensor:
        return scores

    def support(self, scores: Tensor) -> Chosen:
        if prefers_dense(scores, self.k * len(scores)):
            return None
        return largest_positions(scores, self.k, scores.abs())

    def forward(self, scores: Tensor | SparseCodes) -> Tensor | SparseCodes:
        if isinstance(scores, SparseCodes):
            return scores
        indices = scores.detach().abs().topk(self.k, dim=-1, sorted=False).indices
        return torch.zeros_like(scores).scatter(-1, indices, scores.gather(-1, indices))

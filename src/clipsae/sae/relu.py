"""ReLU with an l1 penalty: z = relu(s), loss + l1 * sum(z).

Bricken et al., "Towards Monosemanticity", 2023; PatchSAE (Lim et al., ICLR 2025), whose form and
scale this is.
"""

import torch
from torch import Tensor

from clipsae.sae.base import Activation, Step, per_latent
from clipsae.sae.blockwise import blockwise
from clipsae.sae.checks import not_negative
from clipsae.sae.losses import mean_over_tokens
from clipsae.sae.registry import ACTIVATIONS
from clipsae.sae.support import Support, positions_above


@ACTIVATIONS.register("relu")
class ReLU(Activation):
    """z = relu(s).

    Args:
        latents: M.
        l1: weight of the mean over tokens of sum_m z_m. Where decoder rows are not kept at unit
            norm, z_m is multiplied by its row's norm: otherwise the penalty is escaped by small
            codes and long rows.
    """

    holds_back = False

    def __init__(self, latents: int, *, l1: float = 8e-5) -> None:
        super().__init__(latents)
        not_negative("l1", l1)
        self.l1 = l1

    def threshold(self, scores: Tensor) -> Tensor:
        return scores.new_zeros(())

    def support(self, scores: Tensor) -> Tensor | None:
        return positions_above(scores, scores.new_zeros(()))

    def forward(self, scores: Tensor, support: Support | None = None) -> Tensor:
        return blockwise(torch.relu, scores)

    def losses(self, step: Step) -> dict[str, Tensor]:
        return {"l1": self.l1 * l1_norm(step.codes, step)} if self.l1 else {}


def l1_norm(codes: Tensor, step: Step) -> Tensor:
    """Mean over tokens of the sum of codes >= 0, times the decoder's norms where they vary.

    Args:
        codes: as the step's: [..., M], or [p] on its support.
    """
    if step.architecture.unit_rows:
        return mean_over_tokens(codes, step.tokens)
    norms = step.architecture.decoder_norms()
    norms = per_latent(norms, len(norms), step.latents)
    return mean_over_tokens(codes * norms, step.tokens)

"""ReLU with an l1 penalty: z = relu(s), loss + l1_coefficient * sum(z).

Bricken et al., "Towards Monosemanticity", 2023; PatchSAE (Lim et al., ICLR 2025), whose form and
scale this is.
"""

import torch
from torch import Tensor

from clipsae.sae.base import Activation, LossInputs
from clipsae.sae.checks import not_negative
from clipsae.sae.codes import SparseCodes
from clipsae.sae.dense import at_least_float32, elementwise
from clipsae.sae.engine.reference import Chosen
from clipsae.sae.registry import ACTIVATIONS
from clipsae.sae.sparse_ops import positions_above


@ACTIVATIONS.register("relu")
class ReLU(Activation):
    """z = relu(s).

    Args:
        latents: M.
        l1_coefficient: weight of the mean over tokens of sum_m z_m. Where decoder rows are not kept
            at unit norm, z_m is multiplied by its row's norm: otherwise the penalty is escaped by
            small codes and long rows.
    """

    supports_auxk = False
    penalties = ("l1",)

    def __init__(self, latents: int, *, l1_coefficient: float = 8e-5) -> None:
        super().__init__(latents)
        not_negative("l1_coefficient", l1_coefficient)
        self.l1_coefficient = l1_coefficient

    def threshold(self, scores: Tensor) -> Tensor:
        return scores.new_zeros(())

    def support(self, scores: Tensor) -> Chosen:
        return positions_above(scores, scores.new_zeros(()))

    def forward(self, scores: Tensor | SparseCodes) -> Tensor | SparseCodes:
        return elementwise(torch.relu, scores)

    def losses(self, inputs: LossInputs) -> dict[str, Tensor]:
        if not self.l1_coefficient:
            return {}
        return {"l1": self.l1_coefficient * l1_norm(inputs.codes, inputs)}


def l1_norm(codes: Tensor | SparseCodes, inputs: LossInputs) -> Tensor:
    """Mean over tokens of the sum of codes >= 0, times the decoder's norms where they vary."""
    if not inputs.architecture.unit_rows:
        codes = codes * inputs.architecture.decoder_norms()
    return codes.sum(dtype=at_least_float32(inputs.x[:0]).dtype) / inputs.tokens

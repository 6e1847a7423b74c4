"""Gated: one path decides which latents act, another how much; both share W_enc.

Rajamanoharan et al., "Improving Dictionary Learning with Gated Sparse Autoencoders", 2024
(arXiv 2404.16014). With h = (x - b_dec) W_enc^T (the scores) and pi = h + b_gate:

    z = 1[pi > 0] relu(exp(r_mag) h + b_mag)
    loss + l1_coefficient ||relu(pi)||_1 + ||x - x_hat(relu(pi)), the decoder frozen||^2
"""

from typing import Any

import torch
from torch import Tensor, nn

from clipsae.sae.base import LossInputs, aligned, per_latent
from clipsae.sae.checks import not_negative
from clipsae.sae.codes import SparseCodes
from clipsae.sae.dense import elementwise, passing
from clipsae.sae.engine.reference import Chosen
from clipsae.sae.registry import ACTIVATIONS
from clipsae.sae.relu import Penalized
from clipsae.sae.sparse_ops import positions_above


@ACTIVATIONS.register("gated")
class Gated(Penalized):
    """In evaluation a threshold of -b_gate on the scores h, a trained one per latent.

    Args:
        latents: M.
        gate_weight: weight of the auxiliary reconstruction from the gate's path.
        options: of the penalty on relu(pi), see `Penalized`.
    """

    encoder_bias = False
    # A bias's steps are smaller than bfloat16 resolves.
    full_precision = ("b_gate", "b_mag", "r_mag")

    def __init__(self, latents: int, *, gate_weight: float = 1.0, **options: Any) -> None:
        super().__init__(latents, **options)
        not_negative("gate_weight", gate_weight)
        self.gate_weight = gate_weight
        self.b_gate = nn.Parameter(torch.zeros(latents))
        self.b_mag = nn.Parameter(torch.zeros(latents))
        self.r_mag = nn.Parameter(torch.zeros(latents))

    def threshold(self, scores: Tensor) -> Tensor:
        return -self.b_gate

    def magnitude(self, scores: Tensor, tau: Tensor, latents: Tensor | None) -> Tensor:
        gain = per_latent(self.r_mag, self.latents, latents)
        shift = per_latent(self.b_mag, self.latents, latents)
        return _magnitude(scores, gain, shift)

    def support(self, scores: Tensor) -> Chosen:
        return positions_above(scores, -self.b_gate)

    def forward(self, scores: Tensor | SparseCodes) -> Tensor | SparseCodes:
        # b_gate has gradients of the penalty and of the gate's own reconstruction alone.
        parameters = self.b_gate.detach(), self.r_mag, self.b_mag
        return elementwise(_codes, scores, *(aligned(p, scores) for p in parameters))

    def losses(self, inputs: LossInputs) -> dict[str, Tensor]:
        gate = elementwise(_gate, inputs.scores, aligned(self.b_gate, inputs.scores))
        terms = self.penalty(gate, inputs)
        if self.gate_weight:
            error = inputs.relative_error(inputs.decode(gate, frozen=True))
            terms["gate_reconstruction"] = self.gate_weight * error
        return terms


def _magnitude(h: Tensor, r_mag: Tensor, b_mag: Tensor) -> Tensor:
    return torch.relu(r_mag.exp() * h + b_mag).to(h.dtype)


def _codes(h: Tensor, b_gate: Tensor, r_mag: Tensor, b_mag: Tensor) -> Tensor:
    return _magnitude(h, r_mag, b_mag) * passing(h, -b_gate)


def _gate(h: Tensor, b_gate: Tensor) -> Tensor:
    return torch.relu(h + b_gate).to(h.dtype)

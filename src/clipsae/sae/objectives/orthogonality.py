"""A penalty on decoder rows that point where another one does.

"OrtSAE" (arXiv 2509.22033): the latents are divided into chunks at random, anew in each step, and a
latent pays for the row of its chunk that is most like its own:

    L = mean_m max_{j in chunk of m, j != m} cos(w_m, w_j)^2,  the cosine squared after the maximum.

All pairs would cost M^2 d; chunks of C cost M C d, and every pair meets in one of M / C steps.

M latents, d width, C latents of a chunk.
"""

import torch
from torch import Tensor, nn

from clipsae.sae.base import Activation, Architecture, LossInputs, Objective
from clipsae.sae.checks import not_negative
from clipsae.sae.dense import at_least_float32
from clipsae.sae.registry import OBJECTIVES

CHUNK = 512
"""Latents that are compared with each other. At d = 768, M = 49,152 that are 39 GFLOP a step,
beside 476 of the product of 32 images' tokens with the encoder."""


@OBJECTIVES.register("orthogonality")
class Orthogonality(Objective):
    """weight * the mean over latents of the squared largest cosine within a random chunk.

    Args:
        latents: M, at least 2.
        orthogonality: weight of the penalty, which has no unit: one published beside
            ||x - x_hat||^2 of unit tokens converts as AuxK's does, by r / d (`clipsae.sae.losses`).
    """

    def __init__(self, latents: int, *, orthogonality: float = 0.0) -> None:
        super().__init__()
        not_negative("orthogonality", orthogonality)
        if latents < 2:
            raise ValueError(f"orthogonality={orthogonality} needs two latents, got {latents}")
        self.weight = orthogonality
        self.latents = latents

    def check(self, architecture: Architecture, activation: Activation) -> None:
        rows = architecture.matrices("decoder")
        if rows and not any(matrix.requires_grad for matrix in rows):
            raise ValueError(
                f"orthogonality={self.weight} does nothing with freeze='decoder': leave out one of "
                "them"
            )

    def losses(self, inputs: LossInputs) -> dict[str, Tensor]:
        rows = at_least_float32(inputs.architecture.decoder_rows())
        order = torch.randperm(self.latents, device=rows.device)
        with torch.autocast(rows.device.type, enabled=False):
            units = nn.functional.normalize(rows, dim=-1)
            nearest = nearest_rows(units.detach(), order)
            cosines = (units * units[nearest]).sum(dim=-1)
        return {"orthogonality": self.weight * cosines.square().mean()}


def nearest_rows(units: Tensor, order: Tensor, size: int = CHUNK) -> Tensor:
    """For each of the unit rows [M, d] the other one of its chunk with the largest product:
    LongTensor [M]. Chunks are parts of `order`, a permutation [M], equal but for one, of up to
    `size` rows."""
    nearest = torch.empty_like(order)
    for chunk in order.tensor_split(-(-len(order) // size)):
        part = units[chunk]
        nearest[chunk] = chunk[(part @ part.T).fill_diagonal_(-torch.inf).argmax(dim=-1)]
    return nearest

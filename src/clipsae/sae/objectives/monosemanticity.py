"""MonoSemanticity as a loss: the images of a batch that a latent is active on should look alike.

"MonoLoss" (arXiv 2602.12403). For codes a_i >= 0 of a latent, pooled over each image's tokens, less
the batch's smallest, and unit embeddings e_i of the images, its score is that of
`clipsae.evaluation.metrics.monosemanticity` on the batch alone:

    MS = sum_{i != j} a_i a_j <e_i, e_j> / sum_{i != j} a_i a_j
       = (||sum_i a_i e_i||^2 - sum_i a_i^2) / ((sum_i a_i)^2 - sum_i a_i^2),

and the loss 1 - its mean over the latents that have one. A code's size cancels: the loss moves
activity between images, and makes no code smaller.

B images, T tokens of an image, N tokens in all, M latents, e embedding size, p pairs.
"""

from typing import Any

import torch
from torch import Tensor

from clipsae.sae.base import LossInputs, Objective
from clipsae.sae.checks import not_negative
from clipsae.sae.codes import SparseCodes
from clipsae.sae.dense import at_least_float32
from clipsae.sae.engine import backend
from clipsae.sae.registry import OBJECTIVES

LEAST_PAIRS = 1e-4
"""A latent has a score where sum_{i != j} a_i a_j is above this share of (sum_i a_i)^2. Below it
one image has nearly all of the activity: what is left is a difference of equal numbers, and its
gradient is as large as that is small."""


@OBJECTIVES.register("monosemanticity")
class Monosemanticity(Objective):
    """weight * (1 - mean MonoSemanticity of the batch's images), by CLIP's own embeddings.

    On several devices the images of each are compared with each other only.

    Args:
        latents: M.
        monosemanticity: weight of the loss, which has no unit. A published one (3e-4) converts as
            auxk does: beside ||x - x_hat||^2 of unit tokens by r / d, beside the mean square of
            x - x_hat of tokens as they are by 1 / r (`clipsae.sae.losses`).
    """

    needs = ("embeddings",)

    def __init__(self, latents: int, *, monosemanticity: float = 0.0) -> None:
        super().__init__()
        not_negative("monosemanticity", monosemanticity)
        self.weight = monosemanticity

    def losses(self, inputs: LossInputs) -> dict[str, Tensor]:
        embeddings, images = inputs.embeddings, inputs.shape[0]
        if embeddings is None or embeddings.ndim != 2 or len(embeddings) != images:
            shape = None if embeddings is None else tuple(embeddings.shape)
            raise ValueError(
                f"embeddings of shape {shape}: expected one [e] for each of the {images} images"
            )
        if not len(inputs.x):
            return {"monosemanticity": inputs.x.new_zeros(())}
        with torch.autocast(inputs.x.device.type, enabled=False):
            pooled = image_codes(inputs.codes, images)
            scores, defined = batch_scores(pooled, at_least_float32(embeddings).to(pooled.dtype))
            mean = scores.sum() / defined.sum().clamp(min=1)
            loss = torch.where(defined.any(), 1 - mean, 0)
        return {"monosemanticity": self.weight * loss}


def batch_scores(codes: Tensor, embeddings: Tensor) -> tuple[Tensor, Tensor]:
    """MonoSemanticity of each latent on the images of a batch.

    Args:
        codes: [B, M], float32 or float64.
        embeddings: [B, e], unit length, of the same precision.

    Returns:
        Scores [M] in -1..1, 0 where there is none; and where there is one, BoolTensor [M].
    """
    a = codes - codes.amin(dim=0)
    total, squares = a.sum(dim=0), a.square().sum(dim=0)
    pairs = total.square() - squares
    if len(a) > embeddings.shape[1]:
        alike = (embeddings.T @ a).square().sum(dim=0) - squares
    else:  # the same in the order of products that is cheaper for few images
        cosines = embeddings @ embeddings.T
        alike = (a * ((cosines - torch.diag(cosines.diagonal())) @ a)).sum(dim=0)
    defined = pairs > LEAST_PAIRS * total.square()
    return torch.where(defined, alike / torch.where(defined, pairs, 1), 0), defined


def image_codes(codes: Tensor | SparseCodes, images: int) -> Tensor:
    """Codes [N, M] of B images' tokens, one image after another -> their means over tokens [B, M],
    float32 at least; differentiable. Sparse codes never become dense [N, M]."""
    if not isinstance(codes, SparseCodes):
        wide = at_least_float32(codes[:0]).dtype
        return codes.view(images, -1, codes.shape[-1]).mean(dim=1, dtype=wide)
    tokens = codes.tokens // images
    # [N, B], whose product with the codes [M, N] is the mean: an operation of every backend, and
    # without atomics on a GPU.
    values = at_least_float32(codes.values)
    member = torch.eye(images, dtype=values.dtype, device=values.device) / tokens
    return _Means.apply(values, member.repeat_interleave(tokens, dim=0), codes).T


class _Means(torch.autograd.Function):
    """Codes' values [p], weights [N, B] -> sums over tokens [M, B]."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, weights: Tensor, pairs: SparseCodes) -> Tensor:
        ctx.save_for_backward(weights)
        ctx.pairs = pairs.paired(values)
        return backend(values).accumulate(ctx.pairs, weights)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (weights,) = ctx.saved_tensors
        return backend(gradient).sample(ctx.pairs, weights, gradient.contiguous()), None, None

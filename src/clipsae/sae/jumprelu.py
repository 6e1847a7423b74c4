"""JumpReLU: z = s if s > theta else 0, a trained theta per latent, a penalty on how many pass.

Rajamanoharan et al., "Jumping Ahead: Improving Reconstruction Fidelity with JumpReLU Sparse
Autoencoders", 2024 (arXiv 2407.14435). The jump's derivative is estimated by a rectangle kernel
of width eps: with rect(v) = 1[|v| < 1/2],

    dz/ds = 1[s > theta]        dz/dtheta    = -(theta / eps) rect((s - theta) / eps)
    dStep/ds = 0                dStep/dtheta = -(1 / eps) rect((s - theta) / eps)
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from clipsae.sae.base import Activation, LossInputs, aligned
from clipsae.sae.checks import not_negative, positive
from clipsae.sae.codes import SparseCodes
from clipsae.sae.dense import elementwise, passing
from clipsae.sae.engine.reference import Chosen
from clipsae.sae.registry import ACTIVATIONS
from clipsae.sae.sparse_ops import positions_above


@ACTIVATIONS.register("jumprelu")
class JumpReLU(Activation):
    """theta = exp(log_theta), so that it stays above 0.

    Args:
        latents: M.
        l0_coefficient: weight of the penalty.
        target_l0: None: the penalty is the mean number of latents that pass (the paper); a
            number: (mean / target_l0 - 1)^2 (dictionary_learning), which also pushes back up.
        initial_threshold: theta at the start, in units of the scores.
        bandwidth: eps, in units of the scores.
    """

    # The steps of log_theta are smaller than bfloat16 resolves.
    full_precision = ("log_theta",)

    def __init__(
        self,
        latents: int,
        *,
        l0_coefficient: float = 1e-3,
        target_l0: float | None = None,
        initial_threshold: float = 0.01,
        bandwidth: float = 0.05,
    ) -> None:
        super().__init__(latents)
        not_negative("l0_coefficient", l0_coefficient)
        positive("initial_threshold", initial_threshold)
        positive("bandwidth", bandwidth)
        if target_l0 is not None:
            positive("target_l0", target_l0, ", or null")
        self.l0_coefficient = l0_coefficient
        self.target_l0 = target_l0
        self.bandwidth = bandwidth
        self.log_theta = nn.Parameter(torch.full((latents,), math.log(initial_threshold)))

    def threshold(self, scores: Tensor) -> Tensor:
        return self.log_theta.exp()

    def support(self, scores: Tensor) -> Chosen:
        # Scores a little below theta have no code, but move theta.
        return positions_above(scores, self.log_theta.exp() - 0.50001 * self.bandwidth)

    def forward(self, scores: Tensor | SparseCodes) -> Tensor | SparseCodes:
        return elementwise(
            lambda s, theta: _Jump.apply(s, theta, self.bandwidth), scores, self._theta(scores)
        )

    def _theta(self, scores: Tensor | SparseCodes) -> Tensor:
        return aligned(self.log_theta, scores).exp()

    def losses(self, inputs: LossInputs) -> dict[str, Tensor]:
        if not self.l0_coefficient:
            return {}
        scores, theta = inputs.scores, self._theta(inputs.scores)
        values = scores.values if isinstance(scores, SparseCodes) else scores
        active = _Step.apply(values, theta, self.bandwidth) / inputs.tokens
        if self.target_l0 is not None:
            active = (active / self.target_l0 - 1).square()
        return {"l0": self.l0_coefficient * active}


def _kernel(scores: Tensor, theta: Tensor, bandwidth: float) -> Tensor:
    """1 where |s - theta| < eps / 2, else 0: [..., M], in theta's dtype."""
    distance = (scores - theta).abs_()
    return torch.lt(distance, bandwidth / 2, out=distance)


def _summed(values: Tensor, theta: Tensor) -> Tensor:
    """[n, M] -> [M], in theta's dtype; unchanged where each value has its theta."""
    return values if values.shape == theta.shape else values.sum(dim=0, dtype=theta.dtype)


class _Jump(torch.autograd.Function):
    """s [n, M], theta [M], or both [p] -> s 1[s > theta]."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, theta: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(scores, theta)
        ctx.bandwidth = bandwidth
        return passing(scores, theta).mul_(scores)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        scores, theta = ctx.saved_tensors
        near = _summed(_kernel(scores, theta, ctx.bandwidth).mul_(gradient), theta)
        return passing(scores, theta).mul_(gradient), -theta / ctx.bandwidth * near, None


class _Step(torch.autograd.Function):
    """s [n, M], theta [M], or both [p] -> the number of s > theta, a scalar of theta's dtype."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, theta: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(scores, theta)
        ctx.bandwidth = bandwidth
        counts = [_summed(passing(part, theta), theta) for part in _parts(scores, theta)]
        return sum(counts[1:], counts[0]).sum(dtype=torch.float64).to(theta.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor, None]:
        scores, theta = ctx.saved_tensors
        parts = _parts(scores, theta)
        near = sum(_summed(_kernel(part, theta, ctx.bandwidth), theta) for part in parts)
        return None, -gradient / ctx.bandwidth * near, None


def _parts(scores: Tensor, theta: Tensor) -> tuple[Tensor, ...]:
    """A few tokens each, whose comparisons stay in the cache."""
    return (scores,) if scores.shape == theta.shape else scores.split(16)

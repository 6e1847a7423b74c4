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

from clipsae.sae.base import Activation, Step, per_latent
from clipsae.sae.blockwise import blockwise, passing
from clipsae.sae.checks import not_negative, positive
from clipsae.sae.registry import ACTIVATIONS
from clipsae.sae.support import Support, positions_above


@ACTIVATIONS.register("jumprelu")
class JumpReLU(Activation):
    """theta = exp(log_theta), so that it stays above 0.

    Args:
        latents: M.
        l0: weight of the penalty.
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
        l0: float = 1e-3,
        target_l0: float | None = None,
        initial_threshold: float = 0.01,
        bandwidth: float = 0.05,
    ) -> None:
        super().__init__(latents)
        not_negative("l0", l0)
        positive("initial_threshold", initial_threshold)
        positive("bandwidth", bandwidth)
        if target_l0 is not None:
            positive("target_l0", target_l0, ", or null")
        self.l0 = l0
        self.target_l0 = target_l0
        self.bandwidth = bandwidth
        self.log_theta = nn.Parameter(torch.full((latents,), math.log(initial_threshold)))

    def threshold(self, scores: Tensor) -> Tensor:
        return self.log_theta.exp()

    def support(self, scores: Tensor) -> Tensor | None:
        # Scores a little below theta have no code, but move theta.
        return positions_above(scores, self.log_theta.exp() - 0.50001 * self.bandwidth)

    def forward(self, scores: Tensor, support: Support | None = None) -> Tensor:
        theta = self._theta(None if support is None else support.latent)
        flat = scores if support is not None else scores.flatten(0, -2)
        codes = blockwise(lambda s, theta: _Jump.apply(s, theta, self.bandwidth), flat, theta)
        return codes.view(scores.shape)

    def _theta(self, latents: Tensor | None) -> Tensor:
        return per_latent(self.log_theta, self.latents, latents).exp()

    def losses(self, step: Step) -> dict[str, Tensor]:
        if not self.l0:
            return {}
        theta = self._theta(step.latents)
        scores = step.scores if step.latents is not None else step.scores.flatten(0, -2)
        active = _Step.apply(scores, theta, self.bandwidth) / step.tokens
        if self.target_l0 is not None:
            active = (active / self.target_l0 - 1).square()
        return {"l0": self.l0 * active}


def _kernel(scores: Tensor, theta: Tensor, bandwidth: float) -> Tensor:
    """1 where |s - theta| < eps / 2, else 0: [..., M], in theta's dtype."""
    distance = (scores - theta).abs_()
    return torch.lt(distance, bandwidth / 2, out=distance)


def _summed(values: Tensor, theta: Tensor) -> Tensor:
    """[n, M] -> [M], in theta's dtype; as they are where each value has a theta of its own."""
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

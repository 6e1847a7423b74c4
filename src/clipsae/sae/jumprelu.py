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
from clipsae.sae.blockwise import blockwise
from clipsae.sae.registry import ACTIVATIONS
from clipsae.sae.relu import not_negative
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
        for name, value in (
            ("initial_threshold", initial_threshold),
            ("bandwidth", bandwidth),
            ("target_l0", 1 if target_l0 is None else target_l0),
        ):
            if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
                raise ValueError(f"{name}={value!r}: expected a number above 0")
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
        theta = self._theta(support and support.latent)
        return blockwise(lambda s, theta: _Jump.apply(s, theta, self.bandwidth), scores, theta)

    def _theta(self, latents: Tensor | None) -> Tensor:
        return per_latent(self.log_theta, self.latents, latents).exp()

    def losses(self, step: Step) -> dict[str, Tensor]:
        if not self.l0:
            return {}
        theta = self._theta(step.latents)
        passing = _Step.apply(step.scores, theta, self.bandwidth) / step.tokens
        if self.target_l0 is not None:
            passing = (passing / self.target_l0 - 1).square()
        return {"l0": self.l0 * passing}


def _kernel(scores: Tensor, theta: Tensor, bandwidth: float) -> Tensor:
    """Where |s - theta| < eps / 2: a BoolTensor [..., M]."""
    return (scores - theta).abs_() < bandwidth / 2


def _summed(values: Tensor, theta: Tensor) -> Tensor:
    """[..., M] -> [M], in theta's dtype; as they are where each value has a theta of its own."""
    if values.shape == theta.shape:
        return values.to(theta.dtype)
    return values.flatten(0, -2).sum(dim=0, dtype=theta.dtype)


class _Jump(torch.autograd.Function):
    """s [..., M], theta [M], or both [p] -> s 1[s > theta]."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, theta: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(scores, theta)
        ctx.bandwidth = bandwidth
        return torch.where(scores > theta, scores, 0)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        scores, theta = ctx.saved_tensors
        near = torch.where(_kernel(scores, theta, ctx.bandwidth), gradient, 0)
        near = _summed(near, theta)
        return torch.where(scores > theta, gradient, 0), -theta / ctx.bandwidth * near, None


class _Step(torch.autograd.Function):
    """s [..., M], theta [M], or both [p] -> the number of s > theta, a scalar of theta's dtype."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, theta: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(scores, theta)
        ctx.bandwidth = bandwidth
        return (scores > theta).sum().to(theta.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor, None]:
        scores, theta = ctx.saved_tensors
        if scores.shape == theta.shape:
            near = _kernel(scores, theta, ctx.bandwidth).to(theta.dtype)
        else:
            near = torch.zeros_like(theta)
            for part in scores.flatten(0, -2).split(16):  # in the cache, where there is one
                near += _kernel(part, theta, ctx.bandwidth).sum(dim=0, dtype=theta.dtype)
        return None, -gradient / ctx.bandwidth * near, None

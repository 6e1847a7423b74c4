"""JumpReLU: z = s if s > theta else 0, a trained theta per latent, a penalty on how many pass.

Rajamanoharan et al., "Jumping Ahead: Improving Reconstruction Fidelity with JumpReLU Sparse
Autoencoders", 2024 (arXiv 2407.14435). The jump's derivative is estimated by a rectangle kernel
of width eps: with rect(v) = 1[|v| < 1/2],

    dz/ds = 1[s > theta]        dz/dtheta    = -(theta / eps) rect((s - theta) / eps)
    dStep/ds = 0                dStep/dtheta = -(1 / eps) rect((s - theta) / eps)

The kernel looks at both sides of theta, at scores below 0, too, where theta < eps / 2: it estimates
how dense scores are at theta, which half a kernel would underestimate. (The paper's pseudocode sets
negative scores to 0 first. Then theta < eps / 2 would be pushed by every silent pair alike.)
"""

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
    """theta is learned itself, and set back to 0 where a step of the optimizer took it below.

    The paper and SAELens learn log theta, dictionary_learning theta. Adam changes a parameter by
    about the learning rate in a step, whatever its gradient: log theta then moves theta by a factor
    exp(rate) at most, from 0.01 in 1,500 steps at 4e-4 to 0.018, and no penalty has an effect.
    theta moves as far as a bias does. Below 0 negative codes would pass: dictionary_learning
    leaves theta free there.

    Args:
        latents: M.
        l0_coefficient: weight of the penalty.
        target_l0: None: the penalty is the mean number of latents that pass (the paper); a
            number: (mean / target_l0 - 1)^2 (dictionary_learning), which also pushes back up.
        initial_threshold: theta at the start, above 0, in units of the scores.
        bandwidth: eps, in units of the scores.
    """

    # The steps of theta are smaller than bfloat16 resolves.
    full_precision = ("theta",)
    own_thresholds = True
    penalties = ("l0",)

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
            if target_l0 > latents:
                raise ValueError(
                    f"target_l0={target_l0}: expected a number above 0, up to latents={latents}, "
                    "or null"
                )
        self.l0_coefficient = l0_coefficient
        self.target_l0 = target_l0
        self.bandwidth = bandwidth
        self.theta = nn.Parameter(torch.full((latents,), float(initial_threshold)))

    @torch.no_grad()
    def after_step(self) -> None:
        self.theta.clamp_(min=0)

    def threshold(self, scores: Tensor) -> Tensor:
        return self.theta

    def support(self, scores: Tensor) -> Chosen:
        # Scores a little below theta have no code, but move theta.
        return positions_above(scores, self.theta - 0.50001 * self.bandwidth)

    def forward(self, scores: Tensor | SparseCodes) -> Tensor | SparseCodes:
        theta = aligned(self.theta, scores)
        return elementwise(lambda s, t: _Jump.apply(s, t, self.bandwidth), scores, theta)

    def losses(self, inputs: LossInputs) -> dict[str, Tensor]:
        if not self.l0_coefficient:
            return {}
        scores, theta = inputs.scores, aligned(self.theta, inputs.scores)
        values = scores.values if isinstance(scores, SparseCodes) else scores
        active = _Step.apply(values, theta, self.bandwidth) / inputs.tokens
        if self.target_l0 is not None:
            active = (active / self.target_l0 - 1).square()
        return {"l0": self.l0_coefficient * active}

    def _load_from_state_dict(self, state: dict[str, Tensor], prefix: str, *rest: Any) -> None:
        # Before version 3, log theta was learned.
        if (log_theta := state.pop(f"{prefix}log_theta", None)) is not None:
            state[f"{prefix}theta"] = log_theta.exp()
        super()._load_from_state_dict(state, prefix, *rest)


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

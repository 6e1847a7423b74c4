"""Sparsemax: the scores' projection onto the simplex decides which latents act.

Martins & Astudillo, "From Softmax to Sparsemax", 2016 (arXiv 1602.02068); as an SAE: arXiv
2604.14925 (CVPR 2026). sparsemax(s)_m = max(s_m - tau, 0), with tau such that these sum to 1.
"""

from typing import Any

import torch
from torch import Tensor

from clipsae.sae.base import Activation
from clipsae.sae.checks import boolean, fraction, one_of
from clipsae.sae.codes import SparseCodes
from clipsae.sae.dense import at_least_float32, elementwise
from clipsae.sae.engine import backend
from clipsae.sae.engine.reference import Chosen, above
from clipsae.sae.registry import ACTIVATIONS

WEIGHTS = ("scores", "probabilities")


@ACTIVATIONS.register("sparsemax")
class Sparsemax(Activation):
    """No penalty: the support's size follows from the scores.

    Args:
        latents: M.
        weights: "scores": z = s on the support (released code), whose gradient is the mask alone;
            "probabilities": z = s - tau there (the paper's text), whose gradient is g minus its
            mean over the support.
        clamp: scores below 0 on the support become 0. They are there where the positive scores
            sum to less than 1, as tau is then negative. Only of use with "scores".
        max_activation_frequency: None, or a share of tokens: in training, latents whose mean
            frequency so far is above it get score 0 (released code: 0.1). Never in evaluation,
            where a code would depend on the images before it.
    """

    full_precision = ("frequency",)
    frequency: Tensor
    step: Tensor

    def __init__(
        self,
        latents: int,
        *,
        weights: str = "scores",
        clamp: bool = False,
        max_activation_frequency: float | None = 0.1,
    ) -> None:
        super().__init__(latents)
        one_of("weights", weights, WEIGHTS)
        boolean("clamp", clamp)
        if clamp and weights != "scores":
            raise ValueError("clamp=True does nothing with weights='probabilities': leave it out")
        limit = max_activation_frequency
        if limit is not None:
            expected = "0 < share <= 1, or null"
            fraction("max_activation_frequency", limit, expected, zero=False, one=True)
        self.weights = weights
        self.clamp = clamp
        self.max_activation_frequency = limit
        # There also without the option, so that turning it on does not make a saved state unfit.
        self.register_buffer("frequency", torch.zeros(latents))
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))

    def threshold(self, scores: Tensor) -> Tensor:
        return sparsemax_threshold(scores)

    def magnitude(self, scores: Tensor, tau: Tensor, latents: Tensor | None) -> Tensor:
        if self.weights == "probabilities":
            return _less(scores, tau)
        return torch.relu(scores) if self.clamp else scores

    def support(self, scores: Tensor) -> Chosen:
        limit = self.max_activation_frequency
        zeroed = None if limit is None else self.frequency > limit
        return backend(scores).sparsemax(scores, zeroed)

    def forward(self, scores: Tensor | SparseCodes) -> Tensor | SparseCodes:
        limit = self.max_activation_frequency
        if limit is not None:
            scores = scores * (self.frequency <= limit).to(scores.dtype)
        codes: Tensor | SparseCodes
        if isinstance(scores, SparseCodes):
            codes = _probabilities(scores) if self.weights == "probabilities" else scores
        else:
            tau = self.threshold(scores)
            function = _Probabilities if self.weights == "probabilities" else _Scores
            codes = function.apply(scores, tau)
        if self.clamp:
            codes = elementwise(torch.relu, codes)
        if limit is not None:
            self._count(codes)
        return codes

    @torch.no_grad()
    def _count(self, codes: Tensor | SparseCodes) -> None:
        # f_t = ((t - 1) f_{t-1} + share of this batch's tokens) / t
        if isinstance(codes, SparseCodes):
            count, tokens = codes.count(codes.values > 0), codes.tokens
        else:
            count, tokens = (codes > 0).flatten(0, -2).sum(dim=0), codes.numel() // self.latents
        if tokens == 0:
            return
        # (A quotient of whole numbers would be float32, and a tenth of it more than 0.1.)
        share = count.to(self.frequency.dtype) / tokens
        self.step += 1
        # Not in place: a compiled backward pass compares with the old ones again.
        self.frequency = self.frequency + (share - self.frequency) / self.step


@torch.compiler.disable  # how many steps it takes depends on the scores
@torch.no_grad()
def sparsemax_threshold(scores: Tensor) -> Tensor:
    """tau of sparsemax: the one number for which the sum of max(s - tau, 0) is 1.

    tau is the root of a convex, piecewise linear function: Newton's steps from below,
    tau <- (sum of the scores above tau - 1) / their number, reach it exactly in a few passes
    (Michelot 1986). The threshold of a part of the scores is a lower bound of that of all: the
    backends begin with maxima of groups, and go on with the scores above that bound alone. No sort
    of M; the last sums are float64: in float32 a running sum over thousands of scores moves the
    boundary.

    Args:
        scores: [..., M].

    Returns:
        float64 [..., 1] for scores of any dtype: near 1000, float32 would leave s - tau four
        digits.
    """
    flat = scores.reshape(-1, scores.shape[-1])
    return backend(scores).sparsemax_threshold(flat).view(*scores.shape[:-1], 1)


def _less(scores: Tensor, tau: Tensor) -> Tensor:
    """s - tau in the scores' dtype, of tau in float64.

    Of float32 scores in two float32 steps, as all of them in float64 would take several times as
    long: first less tau's leading digits, exactly where s is near tau, then less the rest.
    """
    wide = at_least_float32(scores)
    leading = tau.to(wide.dtype)
    return ((wide - leading) - (tau - leading).to(wide.dtype)).to(scores.dtype)


def _probabilities(scores: SparseCodes) -> SparseCodes:
    """s - tau of the scores on their support; the gradient is the projection onto it."""
    wide = scores.values.double()
    tau = (scores.sum_latents(wide) - 1) / scores.sizes().clamp(min=1)
    return scores.with_values(_less(scores.values, scores.at_token(tau)))


class _Scores(torch.autograd.Function):
    """z = s where s > tau; the support is a comparison, so dz/ds is the mask.

    A custom function, as the mask is a quarter of what autograd would keep.
    """

    @staticmethod
    def forward(ctx: Any, scores: Tensor, tau: Tensor) -> Tensor:
        support = above(scores, tau)
        ctx.save_for_backward(support)
        return torch.where(support, scores, 0)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (support,) = ctx.saved_tensors
        return torch.where(support, gradient, 0), None


class _Probabilities(torch.autograd.Function):
    """p = max(s - tau(s), 0); the Jacobian is the projection onto the support."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, tau: Tensor) -> Tensor:
        support = above(scores, tau)
        ctx.save_for_backward(support)
        return torch.where(support, _less(scores, tau), 0)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (support,) = ctx.saved_tensors
        inside = torch.where(support, gradient, 0)
        size = support.sum(dim=-1, keepdim=True).clamp(min=1)
        mean = inside.sum(dim=-1, keepdim=True, dtype=torch.float64) / size
        return torch.where(support, _less(inside, mean), 0), None

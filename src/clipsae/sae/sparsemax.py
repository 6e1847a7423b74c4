"""Sparsemax: the scores' projection onto the simplex decides which latents act.

Martins & Astudillo, "From Softmax to Sparsemax", 2016 (arXiv 1602.02068); as an SAE: arXiv
2604.14925 (CVPR 2026). sparsemax(s)_m = max(s_m - tau, 0), with tau such that these sum to 1.
"""

from typing import Any

import torch
from torch import Tensor

from clipsae.sae.base import Activation
from clipsae.sae.registry import ACTIVATIONS

WEIGHTS = ("scores", "probabilities")

_FIRST_LOOK = 128


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

    def __init__(
        self,
        latents: int,
        *,
        weights: str = "scores",
        clamp: bool = False,
        max_activation_frequency: float | None = 0.1,
    ) -> None:
        super().__init__(latents)
        if weights not in WEIGHTS:
            raise ValueError(f"weights={weights!r}: expected one of {', '.join(WEIGHTS)}")
        if clamp and weights != "scores":
            raise ValueError("clamp=True does nothing with weights='probabilities': leave it out")
        limit = max_activation_frequency
        if limit is not None and not 0 < limit <= 1:
            raise ValueError(
                f"max_activation_frequency={limit!r}: expected 0 < share <= 1, or null"
            )
        self.weights = weights
        self.clamp = clamp
        self.max_activation_frequency = limit
        # There also without the option, so that turning it on does not make a saved state unfit.
        self.register_buffer("frequency", torch.zeros(latents))
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))

    def threshold(self, scores: Tensor) -> Tensor:
        return sparsemax_threshold(scores)

    def curve(self, scores: Tensor, tau: Tensor, latents: Tensor | None) -> Tensor:
        if self.weights == "probabilities":
            return (scores - tau).to(scores.dtype)
        return torch.relu(scores) if self.clamp else scores

    def forward(self, scores: Tensor) -> Tensor:
        limit = self.max_activation_frequency
        if limit is not None:
            scores = scores * (self.frequency <= limit).to(scores.dtype)
        tau = sparsemax_threshold(scores)
        function = _Probabilities if self.weights == "probabilities" else _Scores
        codes = function.apply(scores, tau)
        if self.clamp:
            codes = torch.relu(codes)
        if limit is not None:
            self._count(codes.detach())
        return codes

    @torch.no_grad()
    def _count(self, codes: Tensor) -> None:
        # f_t = ((t - 1) f_{t-1} + share of this batch's tokens) / t
        share = (codes > 0).flatten(0, -2).sum(dim=0) / (codes.numel() // self.latents)
        self.step += 1
        self.frequency += (share - self.frequency) / self.step


@torch.no_grad()
def sparsemax_threshold(scores: Tensor) -> Tensor:
    """tau of sparsemax: the one number for which the sum of max(s - tau, 0) is 1.

    With S_r the sum of the r largest scores, tau is the largest (S_r - 1) / r. The r largest alone
    give a lower bound, which is exact once the r-th is not above it: a look at the 128 largest,
    then at four times as many for the tokens whose support does not fit. Supports beyond an eighth
    of M are left to Newton's method over all M, from that bound (Michelot 1986): tau <- (sum of
    the scores above tau - 1) / their number, which grows to the solution in a few steps. No sort
    of M; the sums are float64: in float32 a running sum over thousands of scores moves the
    boundary.

    Args:
        scores: [..., M].

    Returns:
        [..., 1], float64 for float64 scores, else float32, rounded down: no score lies between
        the rounded and the true tau, so `scores > tau` is the exact support.
    """
    m = scores.shape[-1]
    flat = scores.reshape(-1, m)
    tau = flat.new_empty(len(flat), 1, dtype=torch.float64)
    rest = torch.arange(len(flat), device=flat.device)
    look = min(_FIRST_LOOK, m)
    while True:
        some = flat if len(rest) == len(flat) else flat[rest]
        tau[rest], fits = _from_largest(some, look)
        # Whether all fit is a synchronisation on a GPU; the answer decides what is done next.
        rest = rest[~fits]
        if not len(rest) or 4 * look > m // 8:
            break
        look *= 4
    if len(rest) and look < m:
        tau[rest] = _newton(flat[rest], tau[rest])
    if scores.dtype != torch.float64:
        rounded = tau.float()
        down = torch.nextafter(rounded, torch.full_like(rounded, -torch.inf))
        tau = torch.where(rounded.double() > tau, down, rounded)
    return tau.view(*scores.shape[:-1], 1)


def _from_largest(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """tau [N, 1] in float64 from the k largest of scores [N, M], and where [N] it is exact."""
    largest = scores.topk(k, dim=-1).values.double()
    r = torch.arange(1, k + 1, dtype=torch.float64, device=scores.device)
    tau = ((largest.cumsum(dim=-1) - 1) / r).amax(dim=-1, keepdim=True)
    return tau, largest[:, -1] <= tau[:, 0]


def _newton(scores: Tensor, tau: Tensor) -> Tensor:
    """From lower bounds tau [N, 1], float64, of scores [N, M] to the solutions."""
    size = torch.full_like(tau, -1, dtype=torch.int64)
    while True:
        above = scores > tau
        new_size = above.sum(dim=-1, keepdim=True)
        if torch.equal(new_size, size):
            return tau
        size = new_size
        total = torch.where(above, scores, 0).sum(dim=-1, keepdim=True, dtype=torch.float64)
        tau = torch.maximum(tau, (total - 1) / size.clamp(min=1))


class _Scores(torch.autograd.Function):
    """z = s where s > tau; the support is a comparison, so dz/ds is the mask.

    A function of its own because the mask is a quarter of what autograd would keep.
    """

    @staticmethod
    def forward(ctx: Any, scores: Tensor, tau: Tensor) -> Tensor:
        support = scores > tau
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
        support = scores > tau
        ctx.save_for_backward(support)
        return torch.where(support, (scores - tau).to(scores.dtype), 0)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (support,) = ctx.saved_tensors
        inside = torch.where(support, gradient, 0)
        size = support.sum(dim=-1, keepdim=True).clamp(min=1)
        mean = inside.sum(dim=-1, keepdim=True) / size
        return torch.where(support, inside - mean, 0).to(gradient.dtype), None

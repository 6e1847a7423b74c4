"""Losses of nested reconstructions: of a part of the codes, of two parts, ... and of all.

An SAE has one encoding; its codes are divided into disjoint parts, each of which is decoded once,
and the running sums over parts are the nested reconstructions. How codes are divided is an
objective: `objectives.prefixes` (by latent), `objectives.nested_k` (by size).
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from clipsae.rules import list_of, number
from clipsae.sae.base import Architecture, Objective
from clipsae.sae.checks import require
from clipsae.sae.codes import SparseCodes
from clipsae.sae.dense import at_least_float32
from clipsae.sae.losses import relative


class Nested(Objective):
    """An objective in the place of the reconstruction loss: the weighted mean of the losses of
    nested reconstructions, the last of which is that of all codes. An SAE has one at most.

    Attributes:
        weights: of the reconstructions; a list of G, with the sum 1.
    """

    weights: list[float]

    def parts(self, codes: Tensor | SparseCodes, architecture: Architecture) -> Tensor:
        """What each part of the codes [N, M] adds to the reconstruction, without the bias:
        [N, G, d]."""
        raise NotImplementedError

    def reconstruct(
        self,
        codes: Tensor | SparseCodes,
        architecture: Architecture,
        x: Tensor,
        scale: Tensor,
        norm: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """The reconstruction [N, d] by all codes [N, M], and the weighted mean of the losses of the
        nested ones (`relative_error`), a scalar.

        Args:
            x: [N, d].
            scale: [N, 1], what reconstructions are multiplied by, bias included.
            norm: [N], what errors are relative to.
        """
        parts = self.parts(codes, architecture)
        bias = architecture.bias
        bias = parts.new_zeros(parts.shape[-1]) if bias is None else bias
        reconstruction, *errors = _RunningErrors.apply(parts, bias, scale, x)
        errors = zip(self.weights, errors, strict=True)
        mean = torch.stack([weight * error for weight, error in errors]).sum(dim=0)
        return reconstruction, relative(mean, norm)


class _RunningErrors(torch.autograd.Function):
    """Parts [N, G, d], bias [d], scale [N, 1], x [N, d] -> the last of the nested reconstructions
    x_hat_g = scale (bias + part_1 + ... + part_g) [N, d], and mean_d (x_hat_g - x)^2, G times [N].

    A custom function, as one pass over the parts there and one back are a third of autograd's.
    """

    @staticmethod
    def forward(
        ctx: Any, parts: Tensor, bias: Tensor, scale: Tensor, x: Tensor
    ) -> tuple[Tensor, ...]:
        wide_x, wide_scale = at_least_float32(x), at_least_float32(scale)
        total = at_least_float32(bias).expand_as(x)
        residuals = wide_x.new_empty(parts.shape)
        errors = []
        for g in range(parts.shape[1]):
            total = total + parts[:, g]
            residual = torch.sub(total * wide_scale, wide_x, out=residuals[:, g])
            errors.append(residual.square().mean(dim=-1))
        ctx.save_for_backward(residuals, wide_scale, wide_x)
        ctx.dtypes = parts.dtype, bias.dtype, scale.dtype, x.dtype
        return (total * wide_scale).to(parts.dtype), *errors

    @staticmethod
    def backward(ctx: Any, last: Tensor, *errors: Tensor) -> tuple[Tensor | None, ...]:
        residuals, scale, x = ctx.saved_tensors
        of_scale, of_x = ctx.needs_input_grad[2:]
        out, factor = torch.empty_like(residuals), 2 / residuals.shape[-1]
        last = at_least_float32(last)
        total = last.clone()  # the gradient of x_hat_g, summed from the last one on
        along = ((residuals[:, -1] + x) * last).sum(dim=-1, keepdim=True) if of_scale else None
        for g in range(residuals.shape[1] - 1, -1, -1):
            step = residuals[:, g] * (factor * errors[g])[:, None]
            total += step
            torch.mul(total, scale, out=out[:, g])
            if along is not None:
                along += ((residuals[:, g] + x) * step).sum(dim=-1, keepdim=True)
        grads = (
            *(out, out[:, 0].sum(dim=0)),
            None if along is None else along / scale,
            last - total if of_x else None,
        )
        pairs = zip(grads, ctx.dtypes, strict=True)
        return tuple(None if grad is None else grad.to(dtype) for grad, dtype in pairs)


def check_weights(
    name: str, weights: Sequence[float], sizes: str, size: int, equal: str
) -> list[float]:
    """Weights with the sum 1.

    Args:
        name: the option's.
        sizes: what there are `size` of, for the message.
        equal: the option's value that weighs all alike, for the message.

    Raises:
        ValueError: not `size` numbers of at least 0 with a sum above 0.
    """
    require(name, weights, list_of(number(least=0)))
    if len(weights) != size or not sum(weights):
        raise ValueError(
            f"{name}={weights}: expected a number for each of the {size} {sizes}, not all of them "
            f"0, or {equal}, which weighs all alike"
        )
    return [weight / sum(weights) for weight in weights]

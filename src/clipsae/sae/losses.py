"""The one scale of all losses, and how published weights convert to it.

Every variant's reconstruction loss is PatchSAE's: the mean over tokens and features of
(x_hat - x)^2 / ||x||. For a token of norm r and width d that is ||x_hat - x||^2 / (d r). Where a
source minimises something else, its weights are divided by what its first term differs in:

| source's first term, per token          | its tokens           | weight here = published times  |
|-----------------------------------------|----------------------|--------------------------------|
| mean (x_hat-x)^2 / ||x|| (PatchSAE)     | as they are          | 1                              |
| ||x - x_hat||^2                         | as they are          | 1 / (d r)                      |
| ||x - x_hat||^2                         | divided by r         | l1: 1 / d    l0, auxk: r / d   |
| ||x - x_hat||^2                         | times sqrt(d) / r    | l1: d^-3/2   l0: r / d^2       |
| ||x - x_hat||^2 / ||x - mean x||^2      | any (Gao et al.)     | auxk: r / d                    |

A norm that gradients are clipped at converts as auxk does: it is that of the matrices' gradients,
which are those of the loss.

(r: typical norm of a token. With tokens divided by c the codes are divided by c too, so a sum of
codes gains a factor c and a number of latents c^2.) With `normalize_input: true` the codes are
those of unit tokens, while the loss stays that of x: r then appears in the l1 row, too: l1: r / d.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from clipsae.sae.codes import SparseCodes


def relative_error(reconstruction: Tensor, x: Tensor) -> Tensor:
    """Mean over tokens and features of (x_hat - x)^2 / ||x||, a scalar; PatchSAE's loss.

    Args:
        reconstruction, x: [..., d]. Half precision is summed in float32.

    A token of norm 0 has no relative error: it counts as a token, with loss 0. No tokens: 0.
    """
    x, reconstruction = at_least_float32(x), at_least_float32(reconstruction)
    norm = torch.linalg.vector_norm(x, dim=-1)
    weight = torch.where(norm > 0, norm, 1).reciprocal() * (norm > 0)
    errors = (reconstruction - x).square().mean(dim=-1) * weight
    return errors.mean() if errors.numel() else errors.sum()


def mean_over_tokens(codes: "Tensor | SparseCodes", tokens: int) -> Tensor:
    """The sum of all codes over the number of tokens, a scalar, in float32 at least."""
    dtype = torch.float32 if codes.dtype in (torch.bfloat16, torch.float16) else None
    return codes.sum(dtype=dtype) / tokens


def at_least_float32(x: Tensor) -> Tensor:
    """x, half precision as float32."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x

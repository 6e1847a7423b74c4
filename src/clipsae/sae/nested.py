"""Losses of nested reconstructions: of a part of the codes, of two parts, ... and of all.

An SAE has one encoding; its codes are divided into disjoint parts, each of which is decoded once,
and the running sums over parts are the nested reconstructions. How codes are divided is an
objective: `objectives.prefixes` (by latent), `objectives.nested_k` (by size).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from clipsae.rules import list_of, number
from clipsae.sae.base import Architecture, Objective
from clipsae.sae.checks import require
from clipsae.sae.codes import SparseCodes
from clipsae.sae.losses import relative_error


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

    def reconstructions(
        self, codes: Tensor | SparseCodes, architecture: Architecture, scale: Tensor
    ) -> Tensor:
        """The nested reconstructions [N, G, d] of codes [N, M], in units of x.

        Args:
            scale: [N, 1], what they are multiplied by, bias included.
        """
        sums = self.parts(codes, architecture).cumsum(dim=1)
        bias = architecture.bias
        return (sums if bias is None else sums + bias) * scale[:, None]

    def reconstruction_loss(self, reconstructions: Tensor, x: Tensor) -> Tensor:
        """Of `reconstructions` [N, G, d] of x [N, d]: the weighted mean, a scalar."""
        nested = zip(self.weights, reconstructions.unbind(dim=1), strict=True)
        return torch.stack([weight * relative_error(one, x) for weight, one in nested]).sum()


def check_weights(name: str, weights: Sequence[float], sizes: str, size: int) -> list[float]:
    """Weights with the sum 1.

    Args:
        name: the option's.
        sizes: what there are `size` of, for the message.

    Raises:
        ValueError: not `size` numbers of at least 0 with a sum above 0.
    """
    require(name, weights, list_of(number(least=0)))
    if len(weights) != size or not sum(weights):
        raise ValueError(
            f"{name}={weights}: expected a number for each of the {size} {sizes}, not all of them 0"
        )
    return [weight / sum(weights) for weight in weights]

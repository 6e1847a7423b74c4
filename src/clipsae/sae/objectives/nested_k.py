"""Nested sparsity: a token's few largest codes must reconstruct alone, too.

MSAE: Zaigrajew et al., "Interpreting CLIP with Hierarchical Sparse Autoencoders", 2025 (arXiv
2502.20578); HierarchicalTopK: Balagansky et al., 2025 (arXiv 2505.24473). With k_1 < ... < k_G = k,
in the place of the reconstruction loss stands

    sum_g w_g loss(x, b_dec + the k_g largest codes of the token, decoded),    sum_g w_g = 1

MSAE weighs all alike ("uniform") or the sparsest most ("reverse": G, G - 1, ..., 1).
"""

from itertools import pairwise

import torch
from torch import Tensor

from clipsae.rules import is_whole
from clipsae.sae.base import Activation, Architecture
from clipsae.sae.checks import one_of
from clipsae.sae.codes import SparseCodes
from clipsae.sae.nested import Nested, check_weights
from clipsae.sae.registry import OBJECTIVES

WEIGHTS = ("uniform", "reverse")


@OBJECTIVES.register("nested_k")
class NestedK(Nested):
    """Losses of the reconstructions by the largest codes of a token, of an activation with k.

    With BatchTopK, where a token may have fewer or more codes than k, the last one is by all of
    them.

    Args:
        latents: M.
        nested_k: None: of all codes alone; or numbers of codes, ascending, from 1 to k, to which k
            is added where it is not the last.
        nested_k_weights: "uniform", "reverse", or a number for each of them, that of k the last.
    """

    def __init__(
        self,
        latents: int,
        *,
        nested_k: list[int] | None = None,
        nested_k_weights: str | list[float] = "uniform",
    ) -> None:
        super().__init__()
        given = nested_k if isinstance(nested_k, list | tuple) else []
        if not given or not all(is_whole(n) and n >= 1 for n in given):
            raise ValueError(f"nested_k={nested_k!r}: expected a list of integers of at least 1")
        if any(a >= b for a, b in pairwise(given)):
            raise ValueError(f"nested_k={nested_k!r}: expected them to ascend")
        self.sizes = list(given)
        self.given_weights = nested_k_weights

    def check(self, architecture: Architecture, activation: Activation) -> None:
        if not activation.by_size:
            raise ValueError(
                f"nested_k={self.sizes} needs an activation that keeps the largest scores: choose "
                "topk, batch_topk or abs_topk, or leave it out"
            )
        k = int(getattr(activation, "k", 0))
        if self.sizes[-1] > k:
            raise ValueError(f"nested_k={self.sizes}: expected numbers up to k={k}")
        if self.sizes[-1] != k:
            self.sizes.append(k)
        g, weights = len(self.sizes), self.given_weights
        if isinstance(weights, str):
            one_of("nested_k_weights", weights, WEIGHTS)
            weights = [float(g - i if weights == "reverse" else 1) for i in range(g)]
        name = "nested_k_weights"
        self.weights = check_weights(name, weights, "numbers of codes", g, "uniform")

    def parts(self, codes: Tensor | SparseCodes, architecture: Architecture) -> Tensor:
        if isinstance(codes, SparseCodes):
            return architecture.combine(codes.in_parts(codes.ranks(), self.sizes[:-1]))
        k = self.sizes[-1]
        largest = codes.detach().abs().topk(k, dim=-1).indices
        places = torch.arange(k, device=codes.device).expand_as(largest)
        ranks = torch.full_like(codes, k, dtype=torch.int64).scatter(-1, largest, places)
        edges = zip([0, *self.sizes[:-1]], [*self.sizes[:-1], k + 1], strict=True)
        masks = ((ranks >= low) & (ranks < high) for low, high in edges)
        return torch.stack([architecture.combine(codes * mask) for mask in masks], dim=1)

"""Words and latents as short vectors, so that a page finds latents by what they mean, offline.

M latents, W words, e embedding size, k dimensions that are kept.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from clipsae.naming.names import Names

DIMENSIONS = 64  # k, at most


@dataclass(frozen=True)
class Vectors:
    """Rows of 8 bits a number: row i is scales[i] * values[i].

    Attributes:
        values: int8 [n, k].
        scales: float32 [n].
    """

    values: Tensor
    scales: Tensor


def compressed(names: Names) -> tuple[Vectors, Vectors]:
    """The words and the latents, so that the product of two rows is nearly the cosine by which
    `Names.find` compares them.

    Of both the mean is taken away, as there; of their unit rows the k principal directions are
    kept, words and latents with equal weight. With e <= k nothing is lost but the rounding.

    Returns:
        Of W words and of M latents; 0 for latents without examples.
    """
    there = names.examples.any(dim=1)
    words = nn.functional.normalize(names.vocabulary.embeddings.double(), dim=-1)
    words = nn.functional.normalize(words - words.mean(dim=0), dim=-1)
    latents = names.examples.double()
    latents = latents - latents[there].sum(dim=0) / there.sum().clamp(min=1)
    latents = nn.functional.normalize(latents, dim=-1) * there[:, None]
    spread = words.T @ words / len(words) + latents.T @ latents / there.sum().clamp(min=1)
    values, axes = torch.linalg.eigh(spread)
    axes = axes[:, values.argsort(descending=True)[:DIMENSIONS]]
    return _rounded(words @ axes), _rounded(latents @ axes)


def _rounded(rows: Tensor) -> Vectors:
    scales = rows.abs().amax(dim=1).clamp(min=1e-12) / 127
    return Vectors((rows / scales[:, None]).round().to(torch.int8), scales.float())

"""Which latents are strongest, and which stand for a class: deterministic, ties included.

M latents, C classes that have images, n latents kept.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

# How the latents of a class are ranked: by how often they are active on its images (PatchSAE's
# rule), or by how much more often than on the mean class's.
RANKINGS = ("frequency", "contrast")


def top_latents(values: Tensor, n: int) -> Tensor:
    """Indices of the n largest values of each row, [B, M] -> [B, n]; of equals the smaller first.

    `torch.topk` leaves the order of equals to the device; only rows that have some are sorted.
    """
    top = values.topk(min(n + 1, values.shape[-1]))  # one more, to see a tie at the edge
    chosen = top.indices[..., :n].clone()
    tied = (top.values[..., 1:] == top.values[..., :-1]).any(dim=-1)
    if tied.any():
        order = values[tied].sort(dim=-1, descending=True, stable=True).indices
        chosen[tied] = order[..., :n]
    return chosen


def ranked(scores: Tensor, sums: Tensor, n: int) -> Tensor:
    """A class's n latents: by larger score, then larger summed activation, then smaller index.

    Args:
        scores: [M]. By frequency: the (image, token) pairs of the class on which a latent exceeded
            the threshold. By contrast: see `contrast`.
        sums: [M], its activation summed over all tokens of the class.

    Returns:
        LongTensor [n]: its first k are the ranking for k.
    """
    by_sum = sums.sort(descending=True, stable=True).indices
    return by_sum[scores[by_sum].sort(descending=True, stable=True).indices[:n]]


class ClassCounts(NamedTuple):
    """What one class's latents are ranked by, of those that were active on it.

    On the CPU, 12 bytes a latent: at M = 49,152 and 1,000 classes at most 0.6 GB for each SAE, if
    all latents are active on all classes.
    """

    label: int
    images: int  # counted, at least 1
    latents: Tensor  # int32 [active], ascending
    counts: Tensor  # int32 [active], pairs above the threshold
    sums: Tensor  # float32 [active]

    @classmethod
    def of(cls, label: int, images: int, counts: Tensor, sums: Tensor) -> "ClassCounts":
        """From counts and sums of all latents, [M] each."""
        at = (counts.ne(0) | sums.ne(0)).nonzero().flatten()
        kept = at.int().cpu(), counts[at].int().cpu(), sums[at].float().cpu()
        return cls(label, images, *kept)


def contrast(
    classes: Sequence[ClassCounts], m: int, device: torch.device
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """How much more often a latent is active on a class than on the mean class.

        (count - mean) / sqrt(mean + 1)

    The excess in units of the standard deviation of a Poisson count; the 1 keeps latents that are
    hardly ever active from winning by one count. Classes of different size are made comparable:
    count is what a class of the mean size would have, count * (images per class) / (its images),
    and mean is over the classes.

    Yields:
        Of each class its label, scores [M] and summed activations [M], both float64.
    """
    size = sum(one.images for one in classes) / len(classes)
    mean = torch.zeros(m, dtype=torch.float64, device=device)

    def scaled(one: ClassCounts) -> tuple[Tensor, Tensor]:
        return one.latents.long().to(device), one.counts.double().to(device) * (size / one.images)

    for one in classes:
        at, counts = scaled(one)
        mean[at] += counts
    mean /= len(classes)
    for one in classes:
        at, counts = scaled(one)
        scores, sums = -mean, torch.zeros_like(mean)
        scores[at] += counts
        sums[at] = one.sums.double().to(device)
        yield one.label, scores / (mean + 1).sqrt(), sums

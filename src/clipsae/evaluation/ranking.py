"""Which latents stand for a class, and which for an image: deterministic, ties included.

B images, M latents, C classes, n latents kept.
"""

import torch
from torch import Tensor


def top_latents(values: Tensor, n: int) -> Tensor:
    """Indices of the n largest values of each row, [B, M] -> [B, n], the smaller index first
    among equals.

    `torch.topk` leaves the order of equals to the device; only rows that have some are sorted.
    """
    top = values.topk(min(n + 1, values.shape[-1]))  # one more, to see a tie at the edge
    chosen = top.indices[..., :n].clone()
    tied = (top.values[..., 1:] == top.values[..., :-1]).any(dim=-1)
    if tied.any():
        order = values[tied].sort(dim=-1, descending=True, stable=True).indices
        chosen[tied] = order[..., :n]
    return chosen


def class_ranking(counts: Tensor, sums: Tensor, n: int) -> Tensor:
    """A class's n latents: by larger count, then larger summed activation, then smaller index.

    Args:
        counts: [M], (image, token) pairs of the class on which a latent exceeded the threshold.
        sums: [M], its activation summed over all tokens of the class.

    Returns:
        LongTensor [n]: the first k of it are the ranking for k.
    """
    by_sum = sums.sort(descending=True, stable=True).indices
    return by_sum[counts[by_sum].sort(descending=True, stable=True).indices[:n]]


class ClassRankings:
    """The rankings of all classes from images that arrive class by class.

    As the images of a class are neighbours, only the open class's counts are held, [M], and not
    those of all classes, [C, M], which at the paper's size would be 0.8 GB for each SAE.

    Attributes:
        latents: LongTensor [C, n]; of a class without images the first n, as all are equal.
        images: LongTensor [C] on the CPU, images counted.
        open: the class whose images are arriving, or None.
    """

    def __init__(self, classes: int, latents: int, n: int, device: torch.device) -> None:
        self.n = n
        self.latents = torch.arange(n, device=device).repeat(classes, 1)
        self.images = torch.zeros(classes, dtype=torch.long)
        self.open: int | None = None
        self._counts = torch.zeros(latents, dtype=torch.long, device=device)
        self._sums = torch.zeros(latents, dtype=torch.float64, device=device)

    def add(self, labels: list[int], counts: Tensor, sums: Tensor) -> None:
        """Add images in the order of their classes: counts and sums [B, M]."""
        start = 0
        while start < len(labels):
            label, end = labels[start], start
            while end < len(labels) and labels[end] == label:
                end += 1
            if label != self.open:
                self.close()
                if self.images[label]:
                    raise ValueError(f"images of class {label} must be neighbours")
                self.open = label
            self._counts += counts[start:end].sum(dim=0)
            self._sums += sums[start:end].sum(dim=0)
            self.images[label] += end - start
            start = end

    def close(self) -> None:
        """The open class is complete: rank its latents."""
        if self.open is not None:
            self.latents[self.open] = class_ranking(self._counts, self._sums, self.n)
            self._counts.zero_()
            self._sums.zero_()
            self.open = None

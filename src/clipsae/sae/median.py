"""The geometric median: the point with the least sum of distances to all points."""

import torch
from torch import Tensor


def geometric_median(points: Tensor, iterations: int = 100, tolerance: float = 1e-20) -> Tensor:
    """Weiszfeld's algorithm, from the mean, as PatchSAE runs it.

    Args:
        points: [N, p].
        iterations: at most this many.
        tolerance: stops when the sum of distances changes by less, relatively.

    Returns:
        [p], in the points' dtype; the work is done in float64.
    """
    wide = points.double()
    median = wide.mean(dim=0)
    before = None
    for _ in range(iterations):
        distance = torch.linalg.vector_norm(wide - median, dim=1)
        total = distance.sum()
        if before is not None and abs(before - total) <= tolerance * total:
            break
        before = total
        weight = 1 / distance.clamp(min=1e-6)  # the median may be one of the points
        median = (weight[:, None] * wide).sum(dim=0) / weight.sum()
    return median.to(points.dtype)

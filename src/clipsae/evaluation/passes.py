"""What every pass over a dataset's images needs: which images, and models in eval mode."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


def evenly_spaced(labels: Any, limit: int | None) -> list[int]:
    """`limit` of the images, evenly spaced over them in the order of their classes, so that no
    order of a dataset's labels leaves classes out; all of them for None or a larger limit.

    Args:
        labels: of all images, LongTensor [N] or a sequence.

    Returns:
        Indices, ascending.

    Raises:
        ValueError: a limit below 1.
    """
    total = len(labels)
    if limit is None:
        return list(range(total))
    if limit < 1:
        raise ValueError(f"limit_images={limit}: expected at least 1, or None for all")
    limit = min(limit, total)
    by_class = torch.as_tensor(labels).argsort(stable=True)
    return sorted(by_class[[i * total // limit for i in range(limit)]].tolist())


@contextmanager
def in_eval_mode(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Modules in eval mode within the block, each as it was after it."""
    training = [(module, module.training) for module in modules]
    try:
        for module, _ in training:
            module.eval()
        yield
    finally:
        for module, was in training:
            module.train(was)

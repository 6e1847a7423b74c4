"""What every pass over a dataset's images needs: which images, and models in eval mode."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import nn


def evenly_spaced(total: int, limit: int | None) -> list[int]:
    """`limit` of the indices 0..total-1, evenly spaced; all of them for None or a larger limit.

    Raises:
        ValueError: a limit below 1.
    """
    if limit is None:
        return list(range(total))
    if limit < 1:
        raise ValueError(f"limit_images={limit}: expected at least 1, or None for all")
    limit = min(limit, total)
    return [i * total // limit for i in range(limit)]


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

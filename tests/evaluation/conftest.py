"""Shared by the tests of metrics: reduction over processes."""

import pytest
import torch
from torchmetrics import Metric


def _merged(*parts):
    """What the first of these metrics computes after a reduction over all, as in torchmetrics."""
    for same in zip(
        *([m for m in p.modules() if isinstance(m, Metric)] for p in parts), strict=True
    ):
        for name, reduce in same[0]._reductions.items():
            values = [getattr(part, name) for part in same]
            lists = isinstance(values[0], list)
            values = [torch.cat(value) for value in values] if lists else torch.stack(values)
            setattr(same[0], name, reduce(values))
        same[0]._computed = None
    return parts[0].compute()


@pytest.fixture
def merged():
    return _merged

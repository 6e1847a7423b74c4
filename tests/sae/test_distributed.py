"""What ranks keep of their own is together what one process keeps of the whole."""

import pytest
import torch

from clipsae.sae import batch_topk as distributed
from clipsae.sae.batch_topk import share


class Told(Exception):
    pass


def shares(parts, kept, monkeypatch):
    """`share` of each part, with what the others would tell. (tests/training/test_ddp.py has
    processes.)"""
    told = []

    def tell(_, mine):
        told.append(mine)
        raise Told

    def hear(of_all, _):
        for place, value in zip(of_all, told, strict=True):
            place.copy_(value)

    monkeypatch.setattr(distributed.dist, "all_gather", tell)
    for part in parts:
        with pytest.raises(Told):
            share(part, kept, len(parts))
    monkeypatch.setattr(distributed.dist, "all_gather", hear)
    found = []
    for rank, part in enumerate(parts):
        monkeypatch.setattr(distributed.dist, "get_rank", lambda rank=rank: rank)
        found.append(share(part, kept, len(parts)))
    return found


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("levels", [None, 5], ids=["no ties", "ties"])
def test_the_largest_of_all(seed, levels, monkeypatch):
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.randint(0, 40, (3,), generator=generator).tolist()
    # One rank's scores are mostly larger than another's.
    parts = [torch.rand(n, generator=generator) * (1 + 3 * r) + 0.1 for r, n in enumerate(sizes)]
    if levels:
        parts = [(part * levels).ceil() for part in parts]
    kept = int(torch.randint(1, 60, (), generator=generator))
    found = shares(parts, kept, monkeypatch)
    chosen = [part.sort(descending=True).values[:n] for part, n in zip(parts, found, strict=True)]
    expected = torch.cat(parts).sort(descending=True).values[:kept]
    assert torch.equal(torch.cat(chosen).sort(descending=True).values, expected)


def test_too_few_above_zero(monkeypatch):
    parts = [torch.tensor([2.0, -1.0]), torch.tensor([3.0]), torch.empty(0)]
    found = shares(parts, 4, monkeypatch)
    assert found[0] >= 1
    assert found[1:] == [1, 0]


def test_half_precision(monkeypatch):
    parts = [torch.tensor([1.0, 1.0, 2.0]).bfloat16(), torch.tensor([1.0, 3.0]).bfloat16()]
    assert shares(parts, 4, monkeypatch) == [3, 1]

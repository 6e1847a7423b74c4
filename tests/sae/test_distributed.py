"""What the ranks keep is together what one process keeps of the whole batch."""

import pytest
import torch

from clipsae.sae import batch_topk


class Gathering(Exception):
    """Ends `share` where it would wait for the other ranks."""


def shares(parts, kept, monkeypatch):
    """`share` of each rank's part (tests/training/test_ddp.py has processes)."""
    sent = []

    def send(_, mine):
        sent.append(mine)
        raise Gathering

    def receive(gathered, _):
        for place, value in zip(gathered, sent, strict=True):
            place.copy_(value)

    monkeypatch.setattr(batch_topk.dist, "all_gather", send)
    for part in parts:
        with pytest.raises(Gathering):
            batch_topk.share(part, kept, len(parts))
    monkeypatch.setattr(batch_topk.dist, "all_gather", receive)
    found = []
    for rank, part in enumerate(parts):
        monkeypatch.setattr(batch_topk.dist, "get_rank", lambda rank=rank: rank)
        found.append(batch_topk.share(part, kept, len(parts)))
    return found


@pytest.mark.parametrize("levels", [None, 5], ids=["no ties", "ties"])
def test_the_largest_of_all(levels, monkeypatch):
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        sizes = torch.randint(0, 40, (3,), generator=generator).tolist()
        # One rank's scores are mostly larger than another's.
        parts = [
            torch.rand(n, generator=generator) * (1 + 3 * i) + 0.1 for i, n in enumerate(sizes)
        ]
        if levels:
            parts = [(part * levels).ceil() for part in parts]
        kept = int(torch.randint(1, 60, (), generator=generator))
        counts = shares(parts, kept, monkeypatch)
        chosen = [p.sort(descending=True).values[:n] for p, n in zip(parts, counts, strict=True)]
        expected = torch.cat(parts).sort(descending=True).values[:kept]
        assert torch.equal(torch.cat(chosen).sort(descending=True).values, expected)


def test_few_above_zero_and_half_precision(monkeypatch):
    parts = [torch.tensor([2.0, -1.0]), torch.tensor([3.0]), torch.empty(0)]
    found = shares(parts, 4, monkeypatch)
    assert found[0] >= 1
    assert found[1:] == [1, 0]
    parts = [torch.tensor([1.0, 1.0, 2.0]).bfloat16(), torch.tensor([1.0, 3.0]).bfloat16()]
    assert shares(parts, 4, monkeypatch) == [3, 1]

"""What CKNNA and recovery keep and compare is bounded; what is dropped is drawn, and said."""

import logging
from importlib import import_module

import pytest
import torch

from clipsae.evaluation.metrics import CKNNA, cknna, concept_recovery
from clipsae.evaluation.metrics.rows import SampledCodes, _hash
from tests.evaluation.batches import batch_of, options, sae_of

MODULE = import_module("clipsae.evaluation.metrics.cknna")
RECOVERY = import_module("clipsae.evaluation.metrics.recovery")
N, M, V, D = 600, 30, 5, 8


def sample() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens, codes of half of all latents, and truth that some latents tell."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(N, D, generator=g)
    codes = torch.relu(x @ torch.randn(D, M, generator=g))
    return x, codes, x[:, :V] > 0.5


def aligned(k=10):
    return CKNNA(sae_of(M, D), options(N, k=k))


class Rows(SampledCodes):
    """Recovery's bound with a truth of its own."""

    def __init__(self):
        super().__init__(sae_of(M), options(N), V, torch.bool)

    def too_much(self, rows, entries):
        return RECOVERY._InImages.too_much(self, rows, entries)

    def update(self, batch):
        self._add(torch.tensor(batch.positions), batch.image_truth, batch.codes[:, 0])

    def compute(self):
        _, truth, codes = self._rows()
        self._note(codes)
        return concept_recovery(codes, truth)


def fill(metric, codes, **given):
    for start in range(0, N, 70):
        part = slice(start, start + 70)
        metric.update(batch_of(codes[part], start, **{k: v[part] for k, v in given.items()}))
    return metric


@pytest.mark.parametrize("k", [1, 10])
def test_dense_and_sparse_products_give_the_same(k, monkeypatch):
    x, codes, _truth = sample()
    found = []
    for share in (0, 2):
        monkeypatch.setattr(MODULE, "_DENSE_FROM", share)
        found.append(cknna(x, codes, k))
    torch.testing.assert_close(found[0], found[1], rtol=1e-11, atol=0)


def test_below_the_bound_nothing_is_dropped(caplog):
    x, codes, truth = sample()
    with caplog.at_level(logging.INFO, "clipsae"):
        metric = fill(aligned(), codes, tokens=x)
        found = metric.compute()
        torch.testing.assert_close(found["cknna"], cknna(x, codes), rtol=1e-12, atol=0)
        recovery = fill(Rows(), codes, image_truth=truth)
        found, expected = recovery.compute(), concept_recovery(codes, truth)
    assert all(torch.equal(found[key].nan_to_num(), expected[key].nan_to_num()) for key in expected)
    assert metric.compared is recovery.compared is None
    assert not caplog.records


def test_recovery_keeps_a_bounded_part_and_says_so(monkeypatch, caplog):
    _x, codes, truth = sample()
    limit = int((codes != 0).sum()) // 3
    monkeypatch.setattr(RECOVERY, "_ENTRIES", limit)
    metric = fill(Rows(), codes, image_truth=truth)
    assert sum(map(len, metric.values)) <= limit
    with caplog.at_level(logging.INFO, "clipsae"):
        found = metric.compute()
    kept = _hash(torch.arange(N)) < 2**29  # a quarter
    expected = concept_recovery(codes[kept], truth[kept])
    assert all(torch.equal(found[key].nan_to_num(), expected[key].nan_to_num()) for key in expected)
    assert metric.compared == int(kept.sum())
    assert f"compares {int(kept.sum())} of {N} rows" in caplog.text
    assert abs(found["mean_auroc"] - concept_recovery(codes, truth)["mean_auroc"]) < 0.03


def test_cknna_compares_a_bounded_part_and_says_so(monkeypatch, caplog):
    x, codes, _truth = sample()
    entries = int((codes != 0).sum())
    monkeypatch.setattr(MODULE, "_DENSE_ELEMENTS", 0)
    monkeypatch.setattr(MODULE, "_WORK", N * entries // 3)  # half of the rows is a quarter of it
    metric = fill(aligned(), codes, tokens=x)
    with caplog.at_level(logging.INFO, "clipsae"):
        found = metric.compute()
    kept = _hash(torch.arange(N)) < 2**30
    expected = cknna(x[kept], codes[kept])
    torch.testing.assert_close(found["cknna"], expected, rtol=1e-11, atol=0)
    assert found["cknna_compared"] == kept.sum()
    assert f"CKNNA compares {int(kept.sum())} of {N} tokens" in caplog.text


def test_processes_that_dropped_more_or_less_are_put_on_one_footing(monkeypatch, merged):
    _x, codes, truth = sample()
    monkeypatch.setattr(RECOVERY, "_ENTRIES", int((codes != 0).sum()) // 3)
    one, other = fill(Rows(), codes, image_truth=truth), Rows()
    other.update(batch_of(codes[:70], image_truth=truth[:70]))
    assert int(one.halvings) == 2 > int(other.halvings) == 0
    merged(one, other)
    kept = _hash(torch.arange(N)) < 2**29
    assert one.compared == kept.sum() + kept[:70].sum()


@pytest.mark.parametrize("halvings", [1, 2, 5])
@pytest.mark.parametrize("period", [1, 2, 64, 196])
def test_rows_are_drawn_evenly_wherever_they_lie(halvings, period):
    kept = (_hash(torch.arange(period * 20_000)) < 2**31 >> halvings).double()
    share = kept.view(-1, period).mean(dim=0)
    expected = 0.5**halvings
    error = (expected * (1 - expected) / 20_000) ** 0.5
    assert ((share - expected).abs() < 5 * error).all()


def test_what_takes_long_says_how_far_it_is(monkeypatch):
    x, codes, truth = sample()
    monkeypatch.setattr(MODULE, "_BLOCK_BYTES", 8 * N * 100)
    monkeypatch.setattr(RECOVERY, "_BLOCK_ELEMENTS", 50 * V)
    images = RECOVERY._InImages(sae_of(M), options(N))
    for metric, given, total in (
        (aligned(), {"tokens": x}, N),
        (images, {"image_truth": truth[:, :1].expand(-1, len(images.names))}, M),
    ):
        told = []
        metric.progress = lambda done, total, what, told=told: told.append((done, total))
        fill(metric, codes, **given).compute()
        assert len(told) > 3
        assert told == sorted(told)
        assert told[-1] == (total, total)

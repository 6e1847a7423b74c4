"""What CKNNA and recovery keep and compare is bounded; what is dropped is drawn, and said."""

import logging
from importlib import import_module

import pytest
import torch

from clipsae.evaluation.metrics import CKNNA, ConceptRecovery, cknna, concept_recovery
from clipsae.evaluation.metrics.rows import _drawn
from clipsae.sae import SparseCodes

MODULE = import_module("clipsae.evaluation.metrics.cknna")
RECOVERY = import_module("clipsae.evaluation.metrics.recovery")
N, M, V, D = 600, 30, 5, 8


def sample() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens, codes of half of all latents, and truth that some latents tell."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(N, D, generator=g)
    codes = torch.relu(x @ torch.randn(D, M, generator=g))
    return x, codes, x[:, :V] > 0.5


def fill(metric, *of: torch.Tensor):
    for parts in zip(*(t.split(70) for t in of), strict=True):
        metric.update(*parts)
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
        metric = fill(CKNNA(D, M), x, codes)
        torch.testing.assert_close(metric.compute(), cknna(x, codes), rtol=1e-12, atol=0)
        recovery = fill(ConceptRecovery(M, V), codes, truth)
        found, expected = recovery.compute(), concept_recovery(codes, truth)
    assert all(torch.equal(found[key].nan_to_num(), expected[key].nan_to_num()) for key in expected)
    assert metric.compared is recovery.compared is None
    assert not caplog.records


def test_recovery_keeps_a_bounded_part_and_says_so(monkeypatch, caplog):
    _x, codes, truth = sample()
    limit = int((codes != 0).sum()) // 3
    monkeypatch.setattr(RECOVERY, "_ENTRIES", limit)
    metric = ConceptRecovery(M, V)
    for c, t in zip(codes.split(70), truth.split(70), strict=True):
        metric.update(c, t)
        assert sum(map(len, metric.values)) <= limit
    with caplog.at_level(logging.INFO, "clipsae"):
        found = metric.compute()
    kept = _drawn(0, N, torch.device("cpu")) < 2**29  # a quarter
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
    metric = fill(CKNNA(D, M), x, codes)
    with caplog.at_level(logging.INFO, "clipsae"):
        found = metric.compute()
    kept = _drawn(0, N, torch.device("cpu")) < 2**30
    torch.testing.assert_close(found, cknna(x[kept], codes[kept]), rtol=1e-11, atol=0)
    assert f"CKNNA compares {int(kept.sum())} of {N} tokens" in caplog.text


def test_processes_that_dropped_more_or_less_are_put_on_one_footing(monkeypatch):
    _x, codes, truth = sample()
    monkeypatch.setattr(RECOVERY, "_ENTRIES", int((codes != 0).sum()) // 3)
    one = fill(ConceptRecovery(M, V), codes, truth)
    other = fill(ConceptRecovery(M, V), codes[:70], truth[:70])
    assert int(one.halvings) == 2 > int(other.halvings) == 0
    both = ConceptRecovery(M, V)
    for name in one._empty:
        setattr(both, name, [*getattr(one, name), *getattr(other, name)])
    both.halvings = torch.maximum(one.halvings, other.halvings)
    found = both._rows()[1]
    kept = _drawn(0, N, torch.device("cpu")) < 2**29
    expected = SparseCodes.from_dense(torch.cat([codes[kept], codes[:70][kept[:70]]]))
    assert torch.equal(found.positions, expected.positions)
    assert torch.equal(found.values, expected.values)


@pytest.mark.parametrize("halvings", [1, 2, 5])
@pytest.mark.parametrize("period", [1, 2, 64, 196])
def test_rows_are_drawn_evenly_wherever_they_lie(halvings, period):
    kept = (_drawn(0, period * 20_000, torch.device("cpu")) < 2**31 >> halvings).double()
    share = kept.view(-1, period).mean(dim=0)
    expected = 0.5**halvings
    error = (expected * (1 - expected) / 20_000) ** 0.5
    assert ((share - expected).abs() < 5 * error).all()
    parts = torch.cat([_drawn(0, 7, torch.device("cpu")), _drawn(7, 9, torch.device("cpu"))])
    assert torch.equal(parts, _drawn(0, 16, torch.device("cpu")))


def test_long_measures_tell_how_far_they_are(monkeypatch):
    x, codes, truth = sample()
    monkeypatch.setattr(MODULE, "_BLOCK_BYTES", 8 * N * 100)
    monkeypatch.setattr(RECOVERY, "_BLOCK_ELEMENTS", 50 * V)
    for metric, of, total in (
        (CKNNA(D, M), (x, codes), N),
        (ConceptRecovery(M, V), (codes, truth), M),
    ):
        told = []
        metric.progress = lambda done, total, told=told: told.append((done, total))
        fill(metric, *of).compute()
        assert len(told) > 3
        assert told == sorted(told)
        assert told[-1] == (total, total)

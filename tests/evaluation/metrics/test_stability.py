"""Stability of dictionaries against a full search."""

import pytest
import torch

from clipsae.evaluation.metrics import fidelity, max_cosines, mean_max_cosine


def rows(m, d=8, seed=0):
    return torch.randn(m, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def cosine(a, b):
    return torch.nn.functional.cosine_similarity(a[:, None], b[None], dim=-1)


def test_max_cosines(monkeypatch):
    monkeypatch.setattr("clipsae.evaluation.metrics.stability._BLOCK_ELEMENTS", 40)
    a, b = rows(13) * 5, rows(9, seed=1)
    best = cosine(a, b).amax(1)
    assert torch.allclose(max_cosines(a, b), best)
    assert mean_max_cosine(a, b).item() == pytest.approx(best.mean().item())
    a[2], b[4] = 0, 0
    best = cosine(a, b[torch.arange(9) != 4]).amax(1)
    found = max_cosines(a, b)
    assert found[2].isnan()
    keep = torch.arange(13) != 2
    assert torch.allclose(found[keep], best[keep])
    assert mean_max_cosine(a, b).item() == pytest.approx(best[keep].mean().item())


def test_dictionaries_of_other_widths_are_refused():
    with pytest.raises(ValueError, match=r"\[M, d\]"):
        max_cosines(rows(3), rows(3, d=5))


def test_fidelity():
    assert fidelity(60, 60, 1) == 1
    assert fidelity(1, 60, 1) == 0
    assert fidelity(30.5, 60, 1) == pytest.approx(0.5)
    assert fidelity(0, 60, 1) < 0
    assert fidelity(5, 10, 10) != fidelity(5, 10, 10)  # NaN: nothing to be kept
    with pytest.raises(ValueError, match=r"0\.\.100"):
        fidelity(120, 60, 1)

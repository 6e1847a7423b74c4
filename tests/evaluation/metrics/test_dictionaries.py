"""Decoder orthogonality, stability of dictionaries and fidelity against loops and full searches."""

import pytest
import torch
from scipy.optimize import linear_sum_assignment

from clipsae.evaluation.metrics.fidelity import fidelity
from clipsae.evaluation.metrics.orthogonality import decoder_orthogonality
from clipsae.evaluation.metrics.stability import matched_cosine, max_cosines, mean_max_cosine


def rows(m, d=8, seed=0):
    return torch.randn(m, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def cosine(a, b):
    return torch.nn.functional.cosine_similarity(a[:, None], b[None], dim=-1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_orthogonality_is_the_mean_squared_cosine_of_pairs(dtype):
    a = (rows(23) * torch.linspace(0.01, 50, 23)[:, None]).to(dtype)
    a[3] = 0  # no direction
    unit = [row / row.norm() for row in a.double() if row.norm() > 0]
    squares = [(p @ q) ** 2 for i, p in enumerate(unit) for j, q in enumerate(unit) if i != j]
    expected = torch.stack(squares).mean().item()
    assert decoder_orthogonality(a).item() == pytest.approx(expected, rel=1e-10)


def test_orthogonality_of_known_dictionaries():
    assert decoder_orthogonality(2 * torch.eye(5)).item() == pytest.approx(0, abs=1e-15)
    assert decoder_orthogonality(torch.ones(4, 3)).item() == pytest.approx(1)
    assert decoder_orthogonality(torch.ones(1, 3)).isnan()
    assert decoder_orthogonality(torch.zeros(4, 3)).isnan()
    # Random rows in 768 dimensions are where the paper's table is.
    assert decoder_orthogonality(rows(4096, 768)).item() == pytest.approx(1 / 768, rel=0.01)


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
    with pytest.raises(ValueError, match=r"\[M, d\]"):
        max_cosines(rows(3), rows(3, d=5))


def clusters(m, seed):
    """Rows that lie close to eight directions."""
    return rows(8, seed=9)[torch.arange(m) % 8] + 0.2 * rows(m, seed=seed)


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (rows(70), rows(70, seed=1)),
        (rows(70), rows(70)[torch.randperm(70)] + 0.1 * rows(70, seed=2)),
        (clusters(70, 1), clusters(70, 2)),
        (rows(5).repeat(14, 1), rows(70, seed=1)),  # equal rows
        (rows(40), rows(70, seed=1)),
        (rows(70), rows(40, seed=1)),
        (rows(2), rows(1, seed=1)),
    ],
)
def test_one_to_one_matching_is_the_best_assignment(a, b):
    cosines = cosine(a, b)
    at = linear_sum_assignment(cosines.numpy(), maximize=True)
    best = cosines[at[0], at[1]].mean().item()
    assert matched_cosine(a * 3, b).item() == pytest.approx(best, rel=1e-5)
    few, many = sorted((len(a), len(b)))
    for epsilon in (1e-1, 1e-3):  # by auction
        found = matched_cosine(a, b, epsilon=epsilon, exact_rows=0).item()
        assert best - epsilon * many / few - 1e-6 <= found <= best + 1e-6


def test_one_to_one_matching_of_known_dictionaries():
    a = rows(50)
    for exact in (0, 100):
        shuffled = a[torch.randperm(50)]
        assert matched_cosine(a, 2 * shuffled, exact_rows=exact).item() == pytest.approx(1)
        twice = torch.cat((a[:1].repeat(2, 1), torch.zeros(3, 8)))  # two rows share one partner
        found = matched_cosine(twice, torch.eye(8).double(), exact_rows=exact).item()
        assert found < mean_max_cosine(twice, torch.eye(8).double()).item()
        assert matched_cosine(a, torch.zeros(3, 8), exact_rows=exact).isnan()
    with pytest.raises(ValueError, match=r"\[M, d\]"):
        matched_cosine(a, rows(3, d=5))
    with pytest.raises(ValueError, match="epsilon=0"):
        matched_cosine(a, a, epsilon=0)


def test_fidelity():
    assert fidelity(60, 60, 1) == 1
    assert fidelity(1, 60, 1) == 0
    assert fidelity(30.5, 60, 1) == pytest.approx(0.5)
    assert fidelity(0, 60, 1) < 0
    assert fidelity(5, 10, 10) != fidelity(5, 10, 10)  # NaN: CLIP itself is at chance
    with pytest.raises(ValueError, match=r"0\.\.100"):
        fidelity(120, 60, 1)

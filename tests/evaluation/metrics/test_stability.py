"""Stability of dictionaries, on ones whose partners are known, and against full searches."""

from itertools import permutations

import pytest
import torch

from clipsae.evaluation.metrics import fidelity, matched_cosines, max_cosines, mean_max_cosine


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


@pytest.mark.parametrize("method", ["assignment", "greedy"])
def test_a_shuffled_copy_is_found_again(method):
    a = rows(40).float()
    order = torch.randperm(40, generator=torch.Generator().manual_seed(1))
    cosines, pairs = matched_cosines(a, 3 * a[order], method)
    assert torch.allclose(cosines, torch.ones(40))
    assert torch.equal(order[pairs[:, 1]], pairs[:, 0])


def test_assignment_is_the_best_of_all():
    a, b = rows(5), rows(5, seed=1)
    c = cosine(a, b)
    best = max(sum(c[i, j].item() for i, j in enumerate(p)) for p in permutations(range(5)))
    assert matched_cosines(a, b)[0].sum().item() == pytest.approx(best)


@pytest.mark.parametrize(("m", "other"), [(12, 12), (7, 12), (12, 7)])
def test_greedy_takes_the_largest_first(m, other):
    a, b = rows(m), rows(other, seed=1)
    left, expected = cosine(a, b), []
    for _ in range(min(m, other)):
        i, j = divmod(left.argmax().item(), other)
        expected.append([i, j])
        left[i], left[:, j] = -9, -9
    cosines, pairs = matched_cosines(a, b, "greedy")
    assert pairs.tolist() == sorted(expected)
    assert torch.allclose(cosines, cosine(a, b)[pairs[:, 0], pairs[:, 1]])


@pytest.mark.parametrize("method", ["assignment", "greedy"])
def test_zero_rows_take_no_part_and_ties_end(method):
    a, b = torch.ones(4, 3), torch.ones(5, 3)
    a[1] = 0
    cosines, pairs = matched_cosines(a, b, method)
    assert pairs[:, 0].tolist() == [0, 2, 3]
    assert len(set(pairs[:, 1].tolist())) == 3
    assert torch.allclose(cosines, torch.ones(3))
    assert len(matched_cosines(torch.zeros(3, 3), b, method)[0]) == 0


def test_what_cannot_be_is_refused(monkeypatch):
    with pytest.raises(ValueError, match="assignment, greedy"):
        matched_cosines(rows(3), rows(3), "best")
    with pytest.raises(ValueError, match=r"\[M, d\]"):
        max_cosines(rows(3), rows(3, d=5))
    monkeypatch.setattr("clipsae.evaluation.metrics.stability._ASSIGNMENT_ROWS", 2)
    with pytest.raises(ValueError, match="use method='greedy'"):
        matched_cosines(rows(3), rows(3))


def test_fidelity():
    assert fidelity(60, 60, 1) == 1
    assert fidelity(1, 60, 1) == 0
    assert fidelity(30.5, 60, 1) == pytest.approx(0.5)
    assert fidelity(0, 60, 1) < 0
    assert fidelity(5, 10, 10) != fidelity(5, 10, 10)  # NaN: nothing to be kept
    with pytest.raises(ValueError, match=r"0\.\.100"):
        fidelity(120, 60, 1)

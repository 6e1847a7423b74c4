"""Spatial coherence against a loop over pairs of neighbours in float64."""

import math

import pytest
import torch

from clipsae.evaluation.floors import RandomDirections, untrained
from clipsae.evaluation.metrics.coherence import LEAST_IMAGES, SpatialCoherence, morans_i
from clipsae.sae import SAE, SparseCodes
from tests.evaluation.made_up import batch_of, options, sizes


def plain(x, h, w):
    """Moran's I of a map, a list of h w numbers, and whether it counts."""
    n, mean = h * w, sum(x) / (h * w)
    y = [v - mean for v in x]
    spread = sum(v * v for v in y)
    above = weights = 0
    for i in range(n):
        for j in range(n):
            near = max(abs(i // w - j // w), abs(i % w - j % w)) == 1
            weights += near
            above += near * y[i] * y[j]
    active = sum(v != 0 for v in x)
    if spread <= 1e-10:
        return math.nan, False
    return n / weights * above / spread, 5 <= active <= int(0.9 * n)


def maps(b=6, h=4, w=3, latents=9):
    generator = torch.Generator().manual_seed(0)
    codes = torch.randn(b, h * w, latents, generator=generator).clamp(min=0)
    codes[..., 0] = 0  # dead
    codes[..., 1] = 2.5  # constant
    codes[..., 2] = torch.arange(h * w) % 2  # scattered
    codes[..., 3] = (torch.arange(h * w) >= 6).float()  # one half
    codes[..., 4] += 0.5  # active everywhere
    codes[..., 5] *= -1
    codes[:, 1:, 6] = 0  # on one patch
    codes[0, :, 7] = 1e-7 * torch.arange(h * w)  # constant but for rounding
    return codes


@pytest.mark.parametrize("grid", [(4, 3), (3, 4), (12, 1), (2, 6)])
def test_morans_i_is_its_definition(grid):
    codes = maps()
    scores, counts = morans_i(SparseCodes.from_dense(codes), grid)
    for b in range(len(codes)):
        for m in range(codes.shape[2]):
            score, counted = plain(codes[b, :, m].double().tolist(), *grid)
            assert scores[b, m].item() == pytest.approx(score, rel=1e-9, abs=1e-12, nan_ok=True)
            assert counts[b, m].item() == counted
    with pytest.raises(ValueError, match="expected 25 patches"):
        morans_i(SparseCodes.from_dense(codes), (5, 5))


def test_what_lies_together_scores_above_what_is_scattered():
    h = w = 8
    row, column = torch.arange(64) // 8, torch.arange(64) % 8
    block, board = ((row < 4) & (column < 4)).float(), ((row + column) % 2).float()
    random = (torch.rand(64, generator=torch.Generator().manual_seed(0)) < 0.25).float()
    scores, counts = morans_i(
        SparseCodes.from_dense(torch.stack((block, board, random), dim=1)[None]), (h, w)
    )
    assert counts.all()
    assert scores[0, 0] > 0.7
    assert scores[0, 1] < 0
    assert scores[0, 2].abs() < 0.2


def test_the_measurement_is_the_mean_of_images_that_count(merged):
    n, grid = 80, (4, 3)
    codes = maps(b=n)
    codes[9:, :, 8] = 0  # active on too few images
    tokens = torch.cat((torch.randn(n, 1, codes.shape[2]), codes), dim=1)  # a class token
    o = options(n, 13, grid=grid)
    parts = []
    for part in (slice(0, 25), slice(25, n), slice(n, n)):
        parts.append(SpatialCoherence(sizes(codes.shape[2]), o))
        if part.start < n:
            parts[-1].update(batch_of(tokens[part], part.start))
    found = merged(*parts)
    means = []
    for m in range(codes.shape[2]):
        each = [plain(codes[b, :, m].double().tolist(), *grid) for b in range(n)]
        counted = [score for score, counts in each if counts]
        if len(counted) >= LEAST_IMAGES:
            means.append(sum(counted) / len(counted))
    assert found["num_evaluable_features"] == len(means) > 2
    assert found["feature_localization"].item() == pytest.approx(sum(means) / len(means))
    low = sum(value < 0.1 for value in means) / len(means)
    assert found["frac_non_localized"].item() == pytest.approx(low)
    assert parts[0].per_latent["spatial_coherence"][[0, 1, 6, 8]].isnan().all()


def test_nothing_to_score_is_nan():
    metric = SpatialCoherence(sizes(2), options(1, 12, grid=(4, 3)))
    metric.update(batch_of(torch.rand(1, 12, 2)))
    found = metric.compute()
    assert found.pop("num_evaluable_features") == 0
    assert all(value.isnan() for value in found.values())


@torch.no_grad()
def test_floors_are_of_some_of_the_images(monkeypatch):
    monkeypatch.setattr("clipsae.evaluation.metrics.coherence.FLOOR_IMAGES", 60)
    monkeypatch.setattr("clipsae.evaluation.metrics.coherence.LEAST_IMAGES", 10)
    sae = SAE(6, 30, "linear", "topk", k=6).eval()
    x = torch.randn(120, 12, 6, generator=torch.Generator().manual_seed(0)).cumsum(dim=1)
    metric = SpatialCoherence(sae, options(120, 12, grid=(4, 3)))
    metric.update(batch_of(sae.encode(x), 0, sae, tokens=x))
    found = metric.compute()
    for of, model in (("random", RandomDirections(x)), ("untrained", untrained(sae, x))):
        scores, counts = morans_i(model.encode_sparse(x[::2]), (4, 3))
        means = [
            score[count].mean()
            for score, count in zip(scores.T, counts.T, strict=True)
            if count.sum() >= 10
        ]
        assert means
        expected = torch.stack(means).mean().item()
        assert found[f"feature_localization_{of}"].item() == pytest.approx(expected)
    assert found.keys() == {number.key for number in SpatialCoherence.numbers}

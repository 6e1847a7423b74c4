"""MonoSemanticity against the loop over all pairs of images."""

import math

import pytest
import torch

from clipsae.evaluation.metrics.monosemanticity import MonoSemanticity, monosemanticity
from clipsae.evaluation.passes import pool_codes
from tests.evaluation.made_up import batch_of, options, sizes


def plain(activations, embeddings):
    scores = []
    e = [row / row.norm() for row in embeddings.double()]
    n = len(e)
    for a in activations.double().T.tolist():
        low, high = min(a), max(a)
        if low == high:
            scores.append(math.nan)
            continue
        r = [(value - low) / (high - low) for value in a]
        over = sum(r[i] * r[j] * (e[i] @ e[j]).item() for i in range(n) for j in range(i + 1, n))
        under = sum(r[i] * r[j] for i in range(n) for j in range(i + 1, n))
        scores.append(over / under if under > 0 else math.nan)
    return scores


def images(n=24, latents=12, size=5):
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(n, latents, generator=generator).clamp(min=0)
    a[:, 0] = 0  # dead
    a[:, 1] = 0.7  # constant
    a[:, 2] = 0
    a[5, 2] = 0.3  # one image
    a[:, 3] = 0
    a[[2, 9], 3] = torch.tensor([0.1, 1e-4])  # two images, far apart
    a[:, 4] = (a[:, 4] > 0.4).float()  # ties
    a[:, 5] -= 2  # below zero
    a[:, 6] = 0.2
    a[7, 6] = 0.9  # one image above a constant that is not zero
    a[:, 7] += 100  # a large mean
    e = torch.randn(n, size, generator=generator) * torch.linspace(0.1, 9, n)[:, None] + 0.3
    return a, e


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_is_its_definition(dtype):
    a, e = images()
    a = a.to(dtype)
    found = monosemanticity(a, e)
    assert found.tolist() == pytest.approx(plain(a, e), rel=1e-8, nan_ok=True)
    assert found.isnan().nonzero().flatten().tolist() == [0, 1, 2, 6]


def test_known_values():
    e = torch.tensor([[1.0, 0], [0, 2], [1, 0]])
    a = torch.tensor([[1.0, 1, 1], [1, 0, 1], [0, 1, 1]])
    assert monosemanticity(a, e).tolist() == pytest.approx([0, 1, math.nan], nan_ok=True)


def measurement():
    return MonoSemanticity(sizes(12), options(embed_dim=5))


def batch(a, e):
    return batch_of(a, embeddings=e)


@pytest.mark.parametrize("parts", [[24], [1, 3, 20], [1] * 24])
def test_batches_of_any_size(parts):
    a, e = images()
    metric = measurement()
    for part in zip(a.split(parts), e.split(parts), strict=True):
        metric.update(batch(*part))
    found = metric.compute()
    expected = plain(a, e)
    live = [score for score in expected if not math.isnan(score)]
    scores = metric.per_latent["monosemanticity"]
    assert scores.tolist() == pytest.approx(expected, rel=1e-8, nan_ok=True)
    assert found["monosemanticity_mean"].item() == pytest.approx(sum(live) / len(live))
    assert found["monosemanticity_max"].item() == pytest.approx(max(live))
    assert found["monosemanticity_live"] == len(live) == 8


def test_processes(merged):
    a, e = images()
    metrics = [measurement() for _ in range(3)]
    metrics[0].update(batch(a[:6], e[:6]))
    metrics[2].update(batch(a[6:], e[6:]))
    merged(*metrics)
    scores = metrics[0].per_latent["monosemanticity"]
    assert scores.tolist() == pytest.approx(plain(a, e), rel=1e-8, nan_ok=True)


def test_one_image_and_no_image():
    a, e = images()
    metric = measurement()
    metric.update(batch(a[:1], e[:1]))
    found = metric.compute()
    assert metric.scores().isnan().all()
    assert found["monosemanticity_mean"].isnan()
    assert found["monosemanticity_live"] == 0
    assert monosemanticity(a[:0], e[:0]).isnan().all()


def test_pooling():
    codes = torch.tensor([[[1.0, -2], [3, 0], [2, 5]]])
    assert pool_codes(codes, "mean").tolist() == [[2, 1]]
    assert pool_codes(codes, "max").tolist() == [[3, 5]]
    assert pool_codes(codes, "cls").tolist() == [[1, -2]]
    many = torch.full((1, 1000, 1), 1.01, dtype=torch.bfloat16)
    assert pool_codes(many).item() == many[0, 0, 0].item()
    with pytest.raises(ValueError, match="mean, max, cls"):
        pool_codes(codes, "sum")


def test_invalid_input_is_refused():
    a, e = images()
    with pytest.raises(ValueError, match="same images"):
        monosemanticity(a, e[:5])
    e[3] = 0
    with pytest.raises(ValueError, match="a direction for each"):
        monosemanticity(a, e)

"""CKNNA against the double sums of its definition."""

import math
import random
import sys

import pytest
import torch

from clipsae.evaluation.metrics import CKNNA, cknna
from tests.evaluation.batches import batch_of, options, sae_of


def plain_hsic(k, l):  # noqa: E741
    """Song et al. 2012, eq. 5: K and L as nested lists with zero diagonals."""
    n = range(len(k))
    m = len(k)
    first = sum(k[i][j] * l[j][i] for i in n for j in n)
    second = sum(k[i][j] for i in n for j in n) * sum(l[i][j] for i in n for j in n)
    third = sum(k[i][j] * l[j][q] for i in n for j in n for q in n)
    return (first + second / ((m - 1) * (m - 2)) - 2 * third / (m - 2)) / (m * (m - 3))


def plain_cknna(x, z, k):
    n = range(len(x))
    kernels = [
        [[sum(a * b for a, b in zip(p, q, strict=True)) for q in points] for p in points]
        for points in (x.double().tolist(), z.double().tolist())
    ]
    near = []
    for kernel in kernels:
        near.append([sorted((j for j in n if j != i), key=lambda j: -kernel[i][j])[:k] for i in n])

    def similarity(a, b):
        both = [
            [[m[i][j] if j in near[a][i] and j in near[b][i] else 0.0 for j in n] for i in n]
            for m in (kernels[a], kernels[b])
        ]
        return plain_hsic(*both)

    product = similarity(0, 0) * similarity(1, 1)
    return similarity(0, 1) / math.sqrt(product) if product > 0 else math.nan


def sample(n, d=6, latents=14, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, generator=generator) + 0.5
    return x, torch.relu(x @ torch.randn(d, latents, generator=generator) - 1.5)


@pytest.mark.parametrize(("n", "k"), [(4, 2), (12, 3), (25, 10), (11, 10)])
def test_is_its_definition(n, k):
    x, z = sample(n)
    assert cknna(x, z, k).item() == pytest.approx(plain_cknna(x, z, k), rel=1e-9)


def test_ties_take_the_smaller_index():
    x, z = sample(16)
    x, z = x.round(), z.round()  # many equal kernel values
    z[3:6] = 0  # tokens without active latents: all neighbours are equally near
    assert cknna(x, z, 4).item() == pytest.approx(plain_cknna(x, z, 4), rel=1e-9)


def test_negative_and_half_precision_codes():
    x, z = sample(20)
    z = (z - 0.3 * (z > 1)).to(torch.bfloat16)
    z[:, :3] *= -1
    assert cknna(x, z, 5).item() == pytest.approx(plain_cknna(x, z, 5), rel=1e-9)


def test_the_same_geometry_is_one_and_zero_codes_are_undefined():
    x, z = sample(30)
    assert cknna(x, 2 * x, 5).item() == pytest.approx(1, rel=1e-9)
    assert cknna(x, torch.zeros_like(z), 5).isnan()


def test_blocks_of_rows_change_nothing(monkeypatch):
    x, z = sample(40)
    whole = cknna(x, z, 6)
    monkeypatch.setattr(sys.modules[cknna.__module__], "_BLOCK_BYTES", 8 * 40 * 7)
    assert cknna(x, z, 6).item() == pytest.approx(whole.item(), rel=1e-12)


def metric_of(x, images=1000, **more):
    metric = CKNNA(sae_of(14, 6), options(images, k=4, **more))
    metric.batch_rows = 30
    return metric


def fill(metric, x, z, *parts):
    for part in parts:
        metric.update(batch_of(z[part], part.start, tokens=x[part]))
    return metric.compute()["cknna"].item()


@pytest.mark.parametrize("cuts", [[70], [1, 29, 70], [30, 60, 70], [60, 1, 70, 29]])
def test_mean_over_full_batches_in_the_order_of_positions_however_they_come(cuts):
    x, z = sample(70)
    expected = sum(cknna(x[s], z[s], 4) for s in (slice(0, 30), slice(30, 60))) / 2
    edges = [0, *sorted(cuts)]
    parts = [slice(edges[i], edges[i + 1]) for i in range(len(cuts))]
    parts = [parts[sorted(cuts).index(cut)] for cut in cuts]
    assert fill(metric_of(x), x, z, *parts) == pytest.approx(expected.item(), rel=1e-12)


def test_a_rest_counts_only_where_there_is_no_full_batch():
    x, z = sample(25)
    metric = metric_of(x)
    assert math.isnan(fill(metric, x, z, slice(0, 3)))
    expected = cknna(x, z, 4).item()
    assert fill(metric, x, z, slice(3, 25)) == pytest.approx(expected, rel=1e-12)
    metric.reset()
    expected = cknna(x[:20], z[:20], 4).item()
    assert fill(metric, x, z, slice(0, 20)) == pytest.approx(expected, rel=1e-12)


def test_a_sample_is_drawn_by_position():
    x, z = sample(40)
    drawn = sorted(random.Random(3).sample(range(40), 12))
    expected = cknna(x[drawn], z[drawn], 4).item()
    metric = metric_of(x, 40, sample_tokens=12, seed=3)
    assert fill(metric, x, z, slice(20, 40), slice(0, 20)) == pytest.approx(expected, rel=1e-12)
    images = CKNNA(sae_of(14, 6), options(8, 5, k=4, sample_tokens=12, seed=3))  # of five tokens
    images.update(batch_of(z.view(8, 5, -1), tokens=x.view(8, 5, -1)))
    assert images.compute()["cknna"].item() == pytest.approx(expected, rel=1e-12)


def test_processes_put_their_rests_together(merged):
    x, z = sample(30)
    metrics = [metric_of(x) for _ in range(3)]
    metrics[0].update(batch_of(z[20:], 20, tokens=x[20:]))
    metrics[2].update(batch_of(z[:20], tokens=x[:20]))  # the second has seen nothing
    found = merged(*metrics)["cknna"]
    assert found.item() == pytest.approx(cknna(x, z, 4).item(), rel=1e-12)


def test_what_cannot_be_is_refused():
    x, z = sample(10)
    with pytest.raises(ValueError, match="k < tokens"):
        cknna(x, z, 10)
    with pytest.raises(ValueError, match="expected as many"):
        cknna(x, z[:9], 3)

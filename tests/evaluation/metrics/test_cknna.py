"""CKNNA against the double sums of its definition."""

import logging
import math
import random
from itertools import pairwise

import pytest
import torch

from clipsae.evaluation.metrics import cknna as module
from clipsae.evaluation.metrics.cknna import CKNNA, cknna
from clipsae.evaluation.metrics.sample import _hash
from tests.evaluation.made_up import batch_of, options, sizes


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


def test_blocks_of_rows_and_dense_or_sparse_products_give_the_same(monkeypatch):
    x, z = sample(40)
    whole, done = cknna(x, z, 6), []
    monkeypatch.setattr(module, "_BLOCK_BYTES", 8 * 40 * 7)
    for share in (0, 2):
        monkeypatch.setattr(module, "_DENSE_FROM", share)
        found = cknna(x, z, 6, lambda *at: done.append(at))
        assert found.item() == pytest.approx(whole.item(), rel=1e-11)
    assert done == [(min(at + 7, 40), 40) for at in range(0, 40, 7)] * 2


def metric_of(x, images=1000, **more):
    metric = CKNNA(sizes(14, 6), options(images, k=4, **more))
    metric.batch_rows = 30
    return metric


def fill(metric, x, z, *parts):
    for part in parts:
        metric.update(batch_of(z[part], part.start, tokens=x[part]))
    return metric.compute()["cknna"].item()


@pytest.mark.parametrize("edges", [[0, 70], [30, 60, 70, 29, 1, 0]])
def test_mean_over_full_batches_in_the_order_of_positions_however_they_come(edges):
    x, z = sample(70)
    expected = sum(cknna(x[s], z[s], 4) for s in (slice(0, 30), slice(30, 60))) / 2
    edges, parts = sorted(edges), []
    for start, stop in pairwise(edges):
        parts.insert(len(parts) // 2, slice(start, stop))
    assert fill(metric_of(x), x, z, *parts) == pytest.approx(expected.item(), rel=1e-12)


def test_a_rest_counts_only_where_there_is_no_full_batch():
    x, z = sample(25)
    metric = metric_of(x)
    assert math.isnan(fill(metric, x, z, slice(0, 3)))
    expected = cknna(x, z, 4).item()
    assert fill(metric, x, z, slice(3, 25)) == pytest.approx(expected, rel=1e-12)


def test_a_sample_is_drawn_by_position():
    x, z = sample(40)
    drawn = sorted(random.Random(3).sample(range(40), 12))
    expected = cknna(x[drawn], z[drawn], 4).item()
    metric = metric_of(x, 40, sample_tokens=12, seed=3)
    assert fill(metric, x, z, slice(20, 40), slice(0, 20)) == pytest.approx(expected, rel=1e-12)
    images = CKNNA(sizes(14, 6), options(8, 5, k=4, sample_tokens=12, seed=3))  # of five tokens
    images.update(batch_of(z.view(8, 5, -1), tokens=x.view(8, 5, -1)))
    assert images.compute()["cknna"].item() == pytest.approx(expected, rel=1e-12)


def test_a_bounded_part_is_compared(monkeypatch, caplog):
    x, z = sample(400)
    monkeypatch.setattr(module, "_DENSE_ELEMENTS", 0)
    pairs = int((z != 0).sum())
    monkeypatch.setattr(module, "_WORK", 400 * pairs // 3)  # half of the rows is a quarter of it
    metric = CKNNA(sizes(14, 6), options(400, k=4))
    metric.update(batch_of(z, tokens=x))
    with caplog.at_level(logging.INFO, "clipsae"):
        found = metric.compute()
    kept = _hash(torch.arange(400)) < 2**30
    torch.testing.assert_close(found["cknna"], cknna(x[kept], z[kept], 4), rtol=1e-11, atol=0)
    assert found["cknna_compared"] == kept.sum()
    assert f"CKNNA compares {int(kept.sum())} of 400 tokens" in caplog.text


def test_invalid_input_is_refused():
    x, z = sample(10)
    with pytest.raises(ValueError, match="k < tokens"):
        cknna(x, z, 10)
    with pytest.raises(ValueError, match="expected as many"):
        cknna(x, z[:9], 3)

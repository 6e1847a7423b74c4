"""CKNNA against the double sums of its definition."""

import math
import sys

import pytest
import torch

from clipsae.evaluation.metrics import CKNNA, cknna


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


def test_mean_over_full_batches_however_they_come():
    x, z = sample(70)
    expected = sum(cknna(x[s], z[s], 4) for s in (slice(0, 30), slice(30, 60))) / 2
    for sizes in ([70], [1, 28, 41], [30, 30, 10]):
        metric = CKNNA(6, 14, k=4, batch_rows=30)
        for part in zip(x.split(sizes), z.split(sizes), strict=True):
            metric.update(*part)
        assert len(metric._rows()[0]) == 10  # memory: never more than a batch waits
        assert metric.compute().item() == pytest.approx(expected.item(), rel=1e-12)


def test_a_rest_counts_only_where_there_is_no_full_batch():
    x, z = sample(25)
    metric = CKNNA(6, 14, k=4, batch_rows=30)
    metric.update(x[:3], z[:3])
    assert metric.compute().isnan()
    metric.update(x[3:], z[3:])
    assert metric.compute().item() == pytest.approx(cknna(x, z, 4).item(), rel=1e-12)
    metric.reset()
    metric.update(x[:20], z[:20])
    assert metric.compute().item() == pytest.approx(cknna(x[:20], z[:20], 4).item(), rel=1e-12)


def test_processes_put_their_rests_together(merged):
    x, z = sample(50)
    metrics = [CKNNA(6, 14, k=4, batch_rows=30) for _ in range(3)]
    metrics[0].update(x[:20], z[:20])
    metrics[2].update(x[20:30], z[20:30])  # the second has seen nothing
    found = merged(*metrics)
    assert found.item() == pytest.approx(cknna(x[:30], z[:30], 4).item(), rel=1e-12)


def test_what_cannot_be_is_refused():
    x, z = sample(10)
    with pytest.raises(ValueError, match="k < tokens"):
        cknna(x, z, 10)
    with pytest.raises(ValueError, match="expected as many"):
        cknna(x, z[:9], 3)
    with pytest.raises(ValueError, match="more than k"):
        CKNNA(6, 14, k=10, batch_rows=10)
    with pytest.raises(ValueError, match=r"expected \[10, 15\]"):
        CKNNA(6, 15).update(x, z)

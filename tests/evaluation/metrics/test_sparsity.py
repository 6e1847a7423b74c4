"""Corpus metrics against the formulas written plainly over all tokens at once."""

import pytest
import torch

from clipsae.evaluation.metrics.sparsity import Sparsity, sparsity_sums, sparsity_values
from tests.evaluation.batches import batch_of, options, sae_of


def corpus(tokens: int = 60, d: int = 16, latents: int = 20):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, d, generator=generator) + 3
    reconstruction = x + 0.3 * torch.randn(tokens, d, generator=generator)
    codes = torch.randn(tokens, latents, generator=generator)
    codes[codes.abs() < 1] = 0  # some are negative: active all the same
    codes[:, 4:7] = 0
    return x, reconstruction, codes


def plain(x, reconstruction, codes):
    x, reconstruction = x.double(), reconstruction.double()
    active = (codes != 0).double()
    per_token = [((a - b).var() / a.var()).item() for a, b in zip(x, reconstruction, strict=True)]
    fvu = (x - reconstruction).square().sum() / (x - x.mean(0)).square().sum()
    return {
        "zero_fraction": (1 - active.mean()).item(),
        "l0": active.sum(1).mean().item(),
        "fvu": fvu.item(),
        "explained_variance": 1 - fvu.item(),
        "fvu_per_token": sum(per_token) / len(per_token),
        "cosine": torch.cosine_similarity(x, reconstruction, dim=1).mean().item(),
        "dead_fraction": (active.sum(0) == 0).double().mean().item(),
    }


@pytest.mark.parametrize("sizes", [[60], [1, 9, 50], [30, 30]])
def test_batches_of_any_size_give_the_corpus_value(sizes):
    data = corpus()
    metric = Sparsity(sae_of(20, 16), options())
    for x, reconstruction, codes in zip(*(part.split(sizes) for part in data), strict=True):
        metric.update(batch_of(codes, tokens=x, reconstruction=reconstruction))
    values = {name: value.item() for name, value in metric.compute().items()}
    assert values == pytest.approx(plain(*data), rel=1e-9)


def test_sums_of_processes_add_up():
    data = corpus()
    halves = [sparsity_sums(*(part[s] for part in data)) for s in (slice(0, 13), slice(13, None))]
    added = {name: halves[0][name] + halves[1][name] for name in halves[0]}
    values = {name: value.item() for name, value in sparsity_values(added).items()}
    assert values == pytest.approx(plain(*data), rel=1e-9)
    metric = Sparsity(sae_of(20, 16), options())
    assert set(metric._reductions) == set(added)
    assert all(
        reduction is torch.sum or "sum" in reduction.__name__
        for reduction in metric._reductions.values()
    )


def test_images_of_tokens_are_tokens():
    x, reconstruction, codes = corpus()
    flat = sparsity_sums(x, reconstruction, codes)
    images = sparsity_sums(*(t.view(6, 10, -1) for t in (x, reconstruction, codes)))
    for name in flat:
        torch.testing.assert_close(flat[name], images[name])


def test_zero_and_constant_tokens_give_no_nan():
    x, reconstruction, codes = corpus()
    values = sparsity_values(
        sparsity_sums(
            torch.cat([x, torch.zeros(1, 16), torch.ones(1, 16)]),
            torch.cat([reconstruction, torch.zeros(1, 16), torch.ones(1, 16)]),
            torch.cat([codes, torch.zeros(2, 20)]),
        )
    )
    assert not any(value.isnan() for value in values.values())
    assert values["fvu_per_token"].item() == pytest.approx(
        plain(x, reconstruction, codes)["fvu_per_token"]
    )


def test_a_perfect_reconstruction():
    x, _, codes = corpus()
    values = sparsity_values(sparsity_sums(x, x, codes))
    assert values["fvu"] == 0
    assert values["explained_variance"] == 1
    assert values["cosine"].item() == pytest.approx(1)

"""Corpus metrics against the formulas written plainly over all tokens at once."""

import pytest
import torch

from clipsae.evaluation.metrics.sparsity import (
    Sparsity,
    code_without_selection,
    sparsity_sums,
    sparsity_values,
)
from clipsae.sae import SAE
from tests.evaluation.made_up import batch_of, options, sizes


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


@pytest.mark.parametrize("parts", [[60], [1, 9, 50]])
def test_batches_and_processes_give_the_corpus_value(parts, merged):
    data = corpus()
    metrics = [Sparsity(sizes(20, 16), options()) for _ in range(2)]
    for i, (x, reconstruction, codes) in enumerate(
        zip(*(p.split(parts) for p in data), strict=True)
    ):
        codes, x, reconstruction = (t.unflatten(0, (-1, 1)) for t in (codes, x, reconstruction))
        metrics[i % 2].update(batch_of(codes, tokens=x, reconstruction=reconstruction))
    values = {name: value.item() for name, value in merged(*metrics).items()}
    assert values == pytest.approx(plain(*data), rel=1e-9)


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


@pytest.mark.parametrize(
    "variant",
    [
        {"activation": "relu"},
        {"activation": "jumprelu", "initial_threshold": 0.5},
        {"activation": "gated"},
        {"activation": "topk", "k": 3},
        {"activation": "batch_topk", "k": 3},
        {"activation": "sparsemax", "architecture": "attention"},
    ],
    ids=lambda options: options["activation"],
)
@torch.no_grad()
def test_the_code_without_selection_is_the_relu_of_the_scores(variant):
    torch.manual_seed(0)
    sae = SAE(d=16, latents=64, **variant)
    x = torch.randn(5, 7, 16)
    sae(x)  # a threshold that is learned from training steps
    sae.eval()
    scores = sae.scores(x)
    code = sae.apply_threshold(scores, sae.threshold(scores))
    dense = code_without_selection(sae, scores, sae.threshold(scores))
    assert torch.equal(dense, scores.relu())
    assert torch.equal(dense[code != 0], code[code != 0])
    if variant["activation"] not in ("relu", "gated"):
        assert (dense != 0).sum() > (code != 0).sum()

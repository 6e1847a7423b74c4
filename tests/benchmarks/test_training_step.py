"""Seconds of a training step: `python -m pytest tests/benchmarks --benchmark-only`.

Run apart from the tests: they assert nothing about time.
"""

import pytest
import torch

from clipsae.sae import sparsemax_threshold
from tests.benchmarks.recipes import recipe

RECIPES = ["relu", "jumprelu", "gated", "topk", "batch_topk", "sparsemax"]


@pytest.mark.parametrize("model", RECIPES)
@pytest.mark.parametrize(("d", "latents", "tokens"), [(128, 2048, 2080), (768, 16384, 512)])
def test_training_step(benchmark, model, d, latents, tokens):
    torch.manual_seed(0)
    sae = recipe(model, d, latents)
    optimizer = torch.optim.Adam(sae.parameters(), lr=1e-4, fused=True)
    x = torch.randn(1, tokens, d)
    sae.initialize(x)

    def step():
        optimizer.zero_grad()
        sae(x).loss.backward()
        sae.after_backward()
        optimizer.step()
        sae.after_step()

    benchmark.pedantic(step, rounds=5, warmup_rounds=1)


@pytest.mark.parametrize("how", ["ours", "sort"])
@pytest.mark.parametrize(("latents", "std"), [(2048, 0.044), (49152, 0.009)])
def test_sparsemax_threshold(benchmark, how, latents, std):
    scores = std * torch.randn(256, latents, generator=torch.Generator().manual_seed(0))

    def sort():
        s = scores.sort(dim=-1, descending=True).values
        r = torch.arange(1, latents + 1)
        sums = s.cumsum(-1)
        k = (s + (1 - sums) / r > 0).sum(-1, keepdim=True)
        return (sums.gather(-1, k - 1) - 1) / k

    benchmark.pedantic({"ours": lambda: sparsemax_threshold(scores), "sort": sort}[how], rounds=5)

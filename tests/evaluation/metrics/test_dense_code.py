"""The code without its selection, for the real variants."""

import pytest
import torch

from clipsae.evaluation.metrics.sparsity import code_without_selection
from clipsae.sae import SAE

VARIANTS = [
    {"activation": "relu"},
    {"activation": "jumprelu", "initial_threshold": 0.5},
    {"activation": "gated"},
    {"activation": "topk", "k": 3},
    {"activation": "batch_topk", "k": 3},
    {"activation": "sparsemax", "architecture": "attention"},
]


@pytest.mark.parametrize("options", VARIANTS, ids=lambda options: options["activation"])
@torch.no_grad()
def test_it_is_the_relu_of_the_scores_and_holds_the_code(options):
    torch.manual_seed(0)
    sae = SAE(d=16, latents=64, **options)
    x = torch.randn(5, 7, 16)
    sae(x)  # a threshold that is learned from training steps
    sae.eval()
    scores = sae.scores(x)
    code = sae.apply_threshold(scores, sae.threshold(scores))
    dense = code_without_selection(sae, scores, sae.threshold(scores))
    assert torch.equal(dense, scores.relu())
    assert torch.equal(dense[code != 0], code[code != 0])
    if options["activation"] not in ("relu", "gated"):
        assert (dense != 0).sum() > (code != 0).sum()

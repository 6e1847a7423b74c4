"""SAEs of every kind with weights that are not near their start, and tokens for them."""

import pytest
import torch
from torch import Tensor

from clipsae.sae import SAE
from clipsae.sae.normalization import Moments

D, M = 12, 40

KINDS = {
    "relu": {"activation": "relu"},
    "topk": {"activation": "topk", "k": 5},
    "batch_topk": {"activation": "batch_topk", "k": 5},
    "matryoshka": {"activation": "batch_topk", "k": 5, "prefixes": "drawn"},
    "jumprelu": {"activation": "jumprelu"},
    "gated": {"activation": "gated"},
    "normalised": {"activation": "jumprelu", "normalize": "unit"},
    "attention": {"activation": "relu", "architecture": "attention", "normalize": "unit"},
    "standardised": {"activation": "batch_topk", "k": 5, "normalize": "mean_std"},
    "whitened": {"activation": "gated", "normalize": "whiten"},
    "whitened_attention": {
        "activation": "jumprelu",
        "architecture": "attention",
        "normalize": "whiten",
        "whitening": 0.5,
    },
    "layer_norm": {"activation": "topk", "k": 5, "normalize": "layer_norm"},
    "abs_topk": {"activation": "abs_topk", "k": 5, "normalize": "mean_std"},
    "matching_pursuit": {
        "architecture": "matching_pursuit",
        "activation": "relu",
        "l1_coefficient": 0.0,
        "k": 6,
        "normalize": "layer_norm",
    },
    "learned_query": {
        "activation": "topk",
        "k": 3,
        "architecture": "attention",
        "query": "learned",
        "scale": "sqrt_d",
    },
}


def random_sae(**options) -> SAE:
    torch.manual_seed(7)
    sae = SAE(d=D, latents=M, **options)
    with torch.no_grad():
        for name, tensor in sae.state_dict().items():
            if tensor.is_floating_point() and "frequency" not in name and "normal" not in name:
                tensor.normal_(std=0.5)
        sae.activation.after_step()
        if "activation.inference_threshold" in sae.state_dict():
            sae.activation.inference_threshold.fill_(0.7)
    mixing = torch.eye(D) + torch.rand(D, D)
    sae.normalization.fit(Moments.of([torch.randn(50, 4, D) @ mixing + 2]))
    return sae.eval()


@pytest.fixture(params=KINDS)
def sae(request) -> SAE:
    return random_sae(**KINDS[request.param])


@pytest.fixture
def x() -> Tensor:
    return 3 * torch.randn(64, D, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def make():
    return random_sae

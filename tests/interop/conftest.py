"""SAEs of every kind with weights that are not near their start, and tokens for them."""

import pytest
import torch
from torch import Tensor

from clipsae.sae import SAE

D, M = 12, 40

KINDS = {
    "relu": {"activation": "relu"},
    "topk": {"activation": "topk", "k": 5},
    "batch_topk": {"activation": "batch_topk", "k": 5},
    "matryoshka": {"activation": "batch_topk", "k": 5, "prefixes": "drawn"},
    "jumprelu": {"activation": "jumprelu"},
    "gated": {"activation": "gated"},
    "normalised": {"activation": "jumprelu", "normalize_input": True},
    "attention": {"activation": "relu", "architecture": "attention", "normalize_input": True},
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
            if tensor.is_floating_point() and "frequency" not in name:
                tensor.normal_(std=0.5)
        sae.activation.after_step()
        if "activation.inference_threshold" in sae.state_dict():
            sae.activation.inference_threshold.fill_(0.7)
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

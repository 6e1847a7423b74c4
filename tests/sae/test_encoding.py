"""Encoding that keeps codes sparse, beside `encode` and `decode`, over all recipes."""

import pytest
import torch

from clipsae.sae import SAE, encoding, support
from clipsae.sae.base import SparseCodes
from tests.sae.conftest import D, M, build, tokens


def evaluated(recipe: str) -> tuple[SAE, torch.Tensor]:
    sae = build(recipe).double()
    for parameter in sae.parameters():
        if parameter.ndim == 1:  # biases start at 0, where one that is left out does not show
            torch.nn.init.uniform_(parameter.data, -0.1, 0.1)
    x = tokens(4, 5, D, dtype=torch.float64)
    sae(x)
    if recipe == "batch_topk":  # its threshold is one of these scores, which rounding may move
        sae.activation.inference_threshold.mul_(1 - 1e-6)
    return sae.eval(), x


@pytest.mark.parametrize("sparse", [True, False])
@torch.no_grad()
def test_codes_and_reconstruction_are_those_of_encode_and_decode(recipe, sparse, monkeypatch):
    monkeypatch.setitem(support.DENSE_FROM, "cpu", 1.0 if sparse else 0.0)
    monkeypatch.setattr(encoding, "BLOCK", 7)  # 20 tokens in three blocks
    sae, x = evaluated(recipe)
    held, codes = sae.encode_held(x), sae.encode(x)
    assert isinstance(held, SparseCodes) == sparse
    if sparse:
        assert (held.support.positions.diff() > 0).all()
        held_codes = held.dense()
    else:
        held_codes = held
    assert (codes != 0).any()
    assert held_codes.shape == (4, 5, M)
    torch.testing.assert_close(held_codes, codes)
    scale = sae.input_scale(x)
    torch.testing.assert_close(sae.decode_held(held, scale), sae.decode(codes, scale))


@torch.no_grad()
def test_a_late_block_with_many_active_latents_makes_all_dense(monkeypatch):
    monkeypatch.setitem(support.DENSE_FROM, "cpu", 0.5)
    monkeypatch.setattr(encoding, "BLOCK", 8)
    sae = SAE(D, M, "linear", "relu", bias_init="zero").eval()
    few, many = -sae.decoder_rows()[:1], sae.decoder_rows()[:1]
    sae.architecture.W_enc.copy_(many.expand(M, -1) + 0.01 * torch.randn(M, D))
    x = torch.cat([few.expand(16, -1), many.expand(4, -1)])[None]
    held = sae.encode_held(x)
    assert isinstance(held, torch.Tensor)
    torch.testing.assert_close(held, sae.encode(x))
    assert (held[0, :16] != 0).float().mean() < 0.5 < (held[0, 16:] != 0).float().mean()

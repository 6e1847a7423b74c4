"""What the metrics' tests share: one process per part of the data, and a small SAE."""

import pytest
import torch
from torch import nn

from clipsae.sae import SparseCodes


def _merged(*parts):
    """What the first of these metrics computes after a reduction over all, as in torchmetrics."""
    whole = parts[0]
    for name, reduce in whole._reductions.items():
        values = [getattr(part, name) for part in parts]
        lists = isinstance(values[0], list)
        values = [torch.cat(value) for value in values] if lists else torch.stack(values)
        setattr(whole, name, reduce(values))
    whole._computed = None
    return whole.compute()


@pytest.fixture
def merged():
    return _merged


class ToySAE(nn.Module):
    """The contract of `clipsae.sae.SAE` in a few lines: TopK, or ReLU for k=None."""

    decoder_bias = None

    def __init__(self, d, latents, k=None, seed=0):
        super().__init__()
        self.config = {"d": d, "latents": latents}
        self.latents = latents
        generator = torch.Generator().manual_seed(seed)
        self.rows = nn.Parameter(torch.randn(latents, d, generator=generator) / d**0.5)
        self.k = k

    def scores(self, x, latents=None):
        return x @ self.rows.T

    def threshold(self, scores):
        if self.k is None:
            return scores.new_zeros(())
        return scores.topk(self.k + 1, dim=-1).values[..., -1:].clamp(min=0)

    def apply_threshold(self, scores, tau, latents=None):
        return torch.where(scores > tau, scores, 0).relu()

    def encode_sparse(self, x):
        scores = self.scores(x)
        return SparseCodes.from_dense(self.apply_threshold(scores, self.threshold(scores)))

    def input_scale(self, x):
        return torch.ones_like(x[..., :1])

    def decode(self, codes, scale=1.0, latents=None):
        codes = codes.dense() if isinstance(codes, SparseCodes) else codes
        rows = self.rows if latents is None else self.rows[latents]
        return codes @ rows * scale

    def decoder_rows(self, latents=None):
        return self.rows


@pytest.fixture
def toy_sae():
    return ToySAE

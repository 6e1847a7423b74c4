"""Decoder orthogonality: how much the dictionary's directions overlap, on average.

The mean over pairs m != m' of cos(d_m, d_m')^2, lower is better; 1/d for random directions. MSAE
(Zaigrajew et al., ICML 2025) takes the rows as they are and divides by M^2; here rows are made
unit, as the norms of C W_V differ between models, and the mean is over the M (M - 1) pairs.

With unit rows it is (||D^T D||_F^2 - M) / (M (M - 1)): a d x d matrix in place of M x M.
"""

import torch
from torch import Tensor, nn

from clipsae.evaluation.metrics.base import METRICS, Measurement, Options
from clipsae.evaluation.numbers import Number
from clipsae.evaluation.passes import Batch
from clipsae.sae import SAE


def decoder_orthogonality(rows: Tensor) -> Tensor:
    """Mean squared cosine of different rows [M, d], float64 scalar; rows of zeros, which have no
    direction, are left out. NaN with fewer than two rows."""
    rows = rows.detach().double()
    rows = nn.functional.normalize(rows[rows.any(dim=-1)], dim=-1, eps=0)
    m = torch.tensor(len(rows), dtype=torch.float64, device=rows.device)
    mean = ((rows.T @ rows).square().sum() - m) / (m * (m - 1))
    return torch.where(m > 1, mean, torch.nan)


@METRICS.register("orthogonality")
class Orthogonality(Measurement):
    """`decoder_orthogonality`, which does not depend on images."""

    numbers = (
        Number(
            "decoder_orthogonality",
            "decoder orthogonality",
            "mean squared cosine of different decoder rows, which the published DO fits",
            ".4f",
            "min",
            paper="do",
        ),
    )
    value: Tensor

    def __init__(self, sae: SAE, options: Options) -> None:
        super().__init__(sae, options)
        start = decoder_orthogonality(sae.decoder_rows())
        self.add_state("value", start, dist_reduce_fx="mean")

    def update(self, batch: Batch) -> None:
        pass

    def compute(self) -> dict[str, Tensor]:
        return {"decoder_orthogonality": self.value}

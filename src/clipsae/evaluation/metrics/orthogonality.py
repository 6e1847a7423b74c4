"""Decoder orthogonality: how much the dictionary's directions overlap, on average.

The mean over pairs m != m' of cos(d_m, d_m')^2, lower is better; 1/d for random directions. MSAE
(Zaigrajew et al., ICML 2025) takes the rows as they are and divides by M^2; here rows are made
unit, as the norms of C W_V differ between models, and the mean is over the M (M - 1) pairs.

With unit rows it is (||D^T D||_F^2 - M) / (M (M - 1)): a d x d matrix in place of M x M.
"""

import torch
from torch import Tensor, nn
from torchmetrics import Metric


def orthogonality_sums(rows: Tensor) -> dict[str, Tensor]:
    """The sums of a block of decoder rows [m, d]; sums of blocks add up.

    Returns:
        `gram` float64 [d, d], `rows` int64: those that are not zero, which have no direction.
    """
    rows = rows.detach().double()
    rows = nn.functional.normalize(rows[rows.any(dim=-1)], dim=-1, eps=0)
    return {"gram": rows.T @ rows, "rows": torch.tensor(len(rows), device=rows.device)}


def orthogonality_value(sums: dict[str, Tensor]) -> Tensor:
    """The mean squared cosine, float64 scalar; NaN with fewer than two rows."""
    m = sums["rows"].double()
    mean = (sums["gram"].square().sum() - m) / (m * (m - 1))
    return torch.where(m > 1, mean, torch.nan)


def decoder_orthogonality(rows: Tensor) -> Tensor:
    """Mean squared cosine of different rows [M, d]; rows of zeros are left out."""
    return orthogonality_value(orthogonality_sums(rows))


class DecoderOrthogonality(Metric):
    """`decoder_orthogonality` of a dictionary given in blocks, whose rows may lie on many devices.

    Args:
        d: width of the rows.
    """

    full_state_update = False
    gram: Tensor
    rows: Tensor

    def __init__(self, d: int) -> None:
        super().__init__()
        self.add_state("gram", torch.zeros(d, d, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("rows", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    def update(self, rows: Tensor) -> None:
        """Add decoder rows [m, d]."""
        for name, value in orthogonality_sums(rows).items():
            setattr(self, name, getattr(self, name) + value)

    def compute(self) -> Tensor:
        """float64 scalar."""
        return orthogonality_value({"gram": self.gram, "rows": self.rows})

"""How sparse the codes are and how faithful the reconstruction: sums over the corpus.

FVU per token and the share of zeros (there and in the paper called L0) follow MSAE (Zaigrajew et
al., ICML 2025); the other FVU is the usual one, over the corpus. Codes are counted with `!= 0`:
they can be negative.

T tokens of a batch, d width, M latents.
"""

import torch
from torch import Tensor
from torchmetrics import Metric

from clipsae.evaluation.numbers import Number

NUMBERS = (
    Number("l0", "L0", "mean number of active latents per token", ".1f", "", headline=True),
    Number(
        "zero_fraction",
        "zero fraction",
        "share of zeros among a token's M codes, the paper's L0 (higher is sparser)",
        ".4f",
        paper="l0",
        headline=True,
    ),
    Number(
        "fvu_per_token",
        "FVU per token",
        "mean over tokens of var(x - x_hat) / var(x), which the published figure is",
        better="min",
        paper="fvu",
    ),
    Number(
        "fvu",
        "FVU",
        "over the corpus, sum |x - x_hat|² / sum |x - mean x|²",
        better="min",
        headline=True,
    ),
    Number("cosine", "cosine", "mean cosine of x and x_hat", paper="cs", headline=True),
    Number("explained_variance", "explained variance", "1 - FVU", table=""),
    Number(
        "dead_fraction",
        "dead latents",
        "share of latents that were active on no token, which the paper's text calls DO",
        ".2%",
        "min",
        headline=True,
    ),
)


def sparsity_sums(x: Tensor, reconstruction: Tensor, fired: Tensor) -> dict[str, Tensor]:
    """The sums of a batch that `sparsity_values` divides; sums of batches add up.

    Args:
        x, reconstruction: [..., d].
        fired: codes [..., M], or LongTensor [M]: on how many of the tokens a latent's code is
            not zero.

    Returns:
        float64 or int64 tensors: scalars, `token_sum` [d] and `fired` [M].
    """
    x = x.flatten(0, -2).double()
    error = x - reconstruction.flatten(0, -2)
    variance = x.var(dim=-1, unbiased=False)
    varied = variance > 0  # a constant token has no variance to explain
    ratio = error.var(dim=-1, unbiased=False)[varied] / variance[varied]
    if fired.ndim > 1:
        fired = (fired != 0).flatten(0, -2).sum(dim=0)
    return {
        "tokens": torch.tensor(len(x), device=x.device),
        "varied_tokens": varied.sum(),
        "squared_error": error.square().sum(),
        "squared_norm": x.square().sum(),
        "token_sum": x.sum(dim=0),
        "variance_ratio": ratio.sum(),
        "cosine": torch.cosine_similarity(x, x - error, dim=-1).sum(),
        "fired": fired,
    }


def sparsity_values(sums: dict[str, Tensor]) -> dict[str, Tensor]:
    """Metrics from sums over the corpus.

    Returns:
        zero_fraction: share of zeros among the codes (higher is sparser).
        l0: mean number of active latents per token.
        fvu: sum ||x - x_hat||^2 / sum ||x - mean x||^2.
        explained_variance: 1 - fvu.
        fvu_per_token: mean over tokens of var(x - x_hat) / var(x), variances over the features.
        cosine: mean cosine of x and x_hat.
        dead_fraction: share of latents that were never active.
    """
    tokens, fired = sums["tokens"], sums["fired"]
    l0 = fired.sum().double() / tokens
    about_mean = sums["squared_norm"] - sums["token_sum"].square().sum() / tokens
    fvu = sums["squared_error"] / about_mean
    return {
        "zero_fraction": 1 - l0 / len(fired),
        "l0": l0,
        "fvu": fvu,
        "explained_variance": 1 - fvu,
        "fvu_per_token": sums["variance_ratio"] / sums["varied_tokens"],
        "cosine": sums["cosine"] / tokens,
        "dead_fraction": (fired == 0).double().mean(),
    }


class SparsityMetrics(Metric):
    """`sparsity_sums` over all batches, and over all processes, then `sparsity_values`.

    Args:
        d: width of the tokens.
        latents: M.
    """

    full_state_update = False

    def __init__(self, d: int, latents: int) -> None:
        super().__init__()
        for name in ("tokens", "varied_tokens"):
            self.add_state(name, torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")
        for name in ("squared_error", "squared_norm", "variance_ratio", "cosine"):
            self.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("token_sum", torch.zeros(d, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("fired", torch.zeros(latents, dtype=torch.long), dist_reduce_fx="sum")

    def update(self, x: Tensor, reconstruction: Tensor, fired: Tensor) -> None:
        """Add a batch: tokens and reconstruction [..., d], and codes or counts as above."""
        for name, value in sparsity_sums(x, reconstruction, fired).items():
            setattr(self, name, getattr(self, name) + value)

    def compute(self) -> dict[str, Tensor]:
        """The metrics that `sparsity_values` describes."""
        return sparsity_values({name: getattr(self, name) for name in self._defaults})

"""How sparse the codes are and how faithful the reconstruction: sums over the corpus.

FVU per token and the share of zeros (there and in the paper called L0) follow MSAE (Zaigrajew et
al., ICML 2025); the other FVU is the usual one, over the corpus. Codes are counted with `!= 0`:
they can be negative.

T tokens of a batch, d width, M latents.
"""

import torch
from torch import Tensor

from clipsae.evaluation.metrics.base import METRICS, Measurement, Options
from clipsae.evaluation.numbers import Number, suffixed
from clipsae.evaluation.passes import Batch
from clipsae.sae import SAE

NUMBERS: tuple[Number, ...] = (
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


@METRICS.register("sparsity")
class Sparsity(Measurement):
    """`sparsity_values` of the codes, over the tokens that the SAE has codes for; where those are
    not all, their share."""

    numbers = (
        *NUMBERS,
        Number(
            "coded_tokens",
            "tokens with codes",
            "share of the images' tokens that the SAE has codes for, where it is not all: see "
            "features.tokens and features.max_norm_ratio",
            ".2%",
            "",
            headline=True,
        ),
    )
    suffix = ""
    tokens: Tensor
    all_tokens: Tensor

    def __init__(self, sae: SAE, options: Options) -> None:
        super().__init__(sae, options)
        x, fired = torch.zeros(1, self.d), torch.zeros(self.latents, dtype=torch.long)
        self._sums = sparsity_sums(x, x, fired).keys()
        for name, like in sparsity_sums(x, x, fired).items():
            self.add_state(name, torch.zeros_like(like), dist_reduce_fx="sum")
        self.add_state("all_tokens", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    def update(self, batch: Batch) -> None:
        self.add(batch.of_kept(batch.targets), batch.of_kept(batch.reconstruction), batch.fired)
        self.all_tokens += batch.streams.shape[:2].numel()

    def add(self, x: Tensor, reconstruction: Tensor, fired: Tensor) -> None:
        """Add tokens, see `sparsity_sums`."""
        for name, value in sparsity_sums(x, reconstruction, fired).items():
            setattr(self, name, getattr(self, name) + value)

    def compute(self) -> dict[str, Tensor]:
        values = sparsity_values({name: getattr(self, name) for name in self._sums})
        if self.all_tokens > self.tokens:
            values["coded_tokens"] = self.tokens / self.all_tokens
        return {f"{name}{self.suffix}": value for name, value in values.items()}


@METRICS.register("dense")
class Dense(Sparsity):
    """`sparsity_values` of the code without its selection, with the suffix _dense."""

    numbers = suffixed(NUMBERS, "_dense")
    needs = ("scores",)
    suffix = "_dense"

    def update(self, batch: Batch) -> None:
        codes = code_without_selection(batch.sae, batch.scores, batch.threshold)
        whole = batch.targets, batch.sae.decode(codes, batch.scale), codes
        self.add(*map(batch.of_kept, whole))


def code_without_selection(sae: SAE, scores: Tensor, tau: Tensor) -> Tensor:
    """The code as if its threshold were lowered to zero where it is above: [..., M].

    What Table 5 of the paper must have counted (K = 32 codes cannot be as dense as it says): MSAE
    reports codes after the top-k and "all", the ReLU without it. For TopK, BatchTopK, JumpReLU and
    Sparsemax in `scores` it is the ReLU of the scores, for ReLU the code itself. A threshold below
    zero stays (a Gated SAE's, with a positive bias of its gate; Sparsemax's of a token whose
    scores are small): the code's own latents are always among these.
    """
    return sae.apply_threshold(scores, tau.clamp(max=0))

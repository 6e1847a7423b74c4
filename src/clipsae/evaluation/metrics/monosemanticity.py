"""MonoSemanticity: do the images that a latent is active on look alike?

Pach et al., "Sparse Autoencoders Learn Monosemantic Features in Vision-Language Models" (2025).
For activations a_i of a latent over N images, r_i = (a_i - min) / (max - min) and embeddings e_i
of a separate image encoder,

    MS = sum_{i<j} r_i r_j cos(e_i, e_j) / sum_{i<j} r_i r_j.

With unit e_i both sums are squares of sums:

    MS = (||sum r_i e_i||^2 - sum r_i^2) / ((sum r_i)^2 - sum r_i^2),

and those follow from sum a e, sum a, sum a^2, sum e and min at the end: one pass, no pairs.

N images, T tokens of an image, M latents, e embedding size.
"""

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from clipsae.evaluation.encoders import JUDGES
from clipsae.evaluation.metrics.base import METRICS, Measurement, Options
from clipsae.evaluation.numbers import Number
from clipsae.evaluation.passes import Batch
from clipsae.sae import SAE

_number = partial(Number, format=".4f", table="interpretability")


def two_largest(stacked: Tensor) -> Tensor:
    """The two largest of each latent: [P, 2, M] of P parts -> [2, M]."""
    return stacked.flatten(0, 1).topk(2, dim=0).values


def monosemanticity_sums(activations: Tensor, embeddings: Tensor) -> dict[str, Tensor]:
    """The sums of a batch; `lowest` and `highest` are merged as such, the others add up.

    Args:
        activations: image codes [B, M].
        embeddings: [B, e], of any length but zero.

    Returns:
        `images` int64; in float64 `activation`, `squared`, `lowest` [M], `highest` [2, M] (the two
        largest), `weighted` [M, e] and `embedding` [e] (sums of unit embeddings).

    Raises:
        ValueError: another number of embeddings than images, or one without a direction.
    """
    if activations.ndim != 2 or embeddings.ndim != 2 or len(activations) != len(embeddings):
        raise ValueError(
            f"activations {tuple(activations.shape)} and embeddings {tuple(embeddings.shape)}: "
            "expected [B, M] and [B, e] of the same images"
        )
    a, e = activations.detach().double(), embeddings.detach().double()
    norm = e.norm(dim=-1, keepdim=True)
    if not (norm.isfinite() & (norm > 0)).all():
        raise ValueError("an image embedding is zero or not finite: expected a direction for each")
    e = e / norm
    lowest = a.new_full((1, a.shape[1]), torch.inf)
    highest = a.new_full((2, a.shape[1]), -torch.inf)
    return {
        "images": torch.tensor(len(a), device=a.device),
        "activation": a.sum(dim=0),
        "squared": a.square().sum(dim=0),
        "weighted": a.T @ e,
        "embedding": e.sum(dim=0),
        "lowest": torch.cat((a, lowest)).amin(dim=0),
        "highest": torch.cat((a, highest)).topk(2, dim=0).values,
    }


def monosemanticity_scores(sums: dict[str, Tensor]) -> Tensor:
    """MS of each latent, float64 [M], in -1..1.

    NaN for dead latents, which have fewer than two images above their smallest activation, so that
    there is no pair to compare (never active, constant, active on one image).
    """
    n, low = sums["images"], sums["lowest"]
    span = sums["highest"][0] - low
    r = (sums["activation"] - n * low) / span
    squares = (sums["squared"] - 2 * low * sums["activation"] + n * low.square()) / span.square()
    direction = (sums["weighted"] - low[:, None] * sums["embedding"]) / span[:, None]
    pairs = r.square() - squares
    score = (direction.square().sum(dim=-1) - squares) / pairs
    # By comparing activations and not by `pairs`, which rounding keeps from being exactly zero.
    alive = (sums["highest"][1] > low) & (pairs > 0)
    return torch.where(alive, score.clamp(-1, 1), torch.nan)


def monosemanticity(activations: Tensor, embeddings: Tensor) -> Tensor:
    """MS of each latent [M] from all images at once: activations [N, M], embeddings [N, e]."""
    return monosemanticity_scores(monosemanticity_sums(activations, embeddings))


@METRICS.register("monosemanticity")
class MonoSemanticity(Measurement):
    """`monosemanticity` of the pooled codes, by the first image encoder and, with a suffix, by each
    further one.

    Holds M x e float64 numbers for each, whatever the number of images: 200 MB at M = 49,152,
    e = 512.
    """

    numbers = (
        _number("monosemanticity_mean", "mean MonoSemanticity", paper="mean_ms", headline=True),
        _number("monosemanticity_max", "max MonoSemanticity", paper="max_ms", headline=True),
        _number("monosemanticity_live", "live latents", format=".0f", better=""),
        *(
            _number(f"monosemanticity_{which}_{name}", f"{which} MonoSemanticity by {name}")
            for name in (*JUDGES, "other")
            for which in ("mean", "max")
        ),
    )
    needs = ("embeddings",)

    def __init__(self, sae: SAE, options: Options) -> None:
        super().__init__(sae, options)
        nothing = torch.zeros(0, self.latents), torch.zeros(0, options.embed_dim)
        self._sums = monosemanticity_sums(*nothing).keys()
        merge: dict[str, Any] = {"lowest": "min", "highest": two_largest}
        for name, start in monosemanticity_sums(*nothing).items():
            self.add_state(name, start, dist_reduce_fx=merge.get(name, "sum"))
        others = [replace(options, embed_dim=size, judges=()) for _, size in options.judges]
        self.others = nn.ModuleList(MonoSemanticity(sae, one) for one in others)

    def update(self, batch: Batch) -> None:
        self.add(batch.pooled, batch.embeddings)
        if self.others:
            for other, embeddings in zip(self._each()[1:], batch.judged, strict=True):
                other.add(batch.pooled, embeddings)

    def _each(self) -> list["MonoSemanticity"]:
        """By each image encoder."""
        return [self, *(one for one in self.others if isinstance(one, MonoSemanticity))]

    def add(self, pooled: Tensor, embeddings: Tensor) -> None:
        """Add images: codes [B, M], embeddings [B, e]."""
        for name, new in monosemanticity_sums(pooled, embeddings).items():
            state = getattr(self, name)
            if name == "lowest":
                self.lowest = torch.minimum(state, new)
            elif name == "highest":
                self.highest = two_largest(torch.stack((state, new)))
            else:
                state += new  # in place: the largest is hundreds of megabytes

    def scores(self) -> Tensor:
        """Of each latent, float64 [M]; NaN for dead ones."""
        return monosemanticity_scores({name: getattr(self, name) for name in self._sums})

    def compute(self) -> dict[str, Tensor]:
        """Mean and maximum over the live latents, and how many those are."""
        self.per_latent, found = {}, {}
        suffixes = ["", *(f"_{name}" for name, _ in self.options.judges)]
        for suffix, one in zip(suffixes, self._each(), strict=True):
            scores = one.scores()
            self.per_latent[f"monosemanticity{suffix}"] = scores
            live = scores[~scores.isnan()]
            found[f"monosemanticity_mean{suffix}"] = live.mean()  # NaN of none
            found[f"monosemanticity_max{suffix}"] = live.max() if len(live) else live.mean()
            if not suffix:  # the same for all
                found["monosemanticity_live"] = torch.tensor(len(live), device=scores.device)
        return found

"""Decoder rows of a dictionary: which are alike, how they lie, which words they point to.

M latents, A those that are alive, d width, e embedding size, W words.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from clipsae.clip import FrozenCLIP
from clipsae.evaluation.ranking import top_latents
from clipsae.sae.dense import without_tf32

_ROWS = 1024  # compared with all others at a time


@dataclass(frozen=True)
class Words:
    """Words that latents are compared with.

    Attributes:
        names: W words.
        best: LongTensor [M, n], the words that each latent's direction aligns with most.
        scores: [M, n], how well.
    """

    names: list[str]
    best: Tensor
    scores: Tensor


@without_tf32()
def nearest(
    rows: Tensor,
    alive: Tensor,
    n: int,
    *,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[Tensor, Tensor]:
    """Each latent's nearest among those that are alive, by the cosine of decoder rows.

    Args:
        rows: [M, d].
        alive: BoolTensor [M].
        progress: called with (rows done, M).

    Returns:
        LongTensor [M, n'] and cosines float32 [M, n'], descending; n' = min(n, A - 1), at least 0.
    """
    unit = nn.functional.normalize(rows.float(), dim=-1)
    kept = alive.nonzero().squeeze(1)
    n = max(0, min(n, len(kept) - 1))
    place = torch.full((len(rows),), -1, device=rows.device)
    place[kept] = torch.arange(len(kept), device=rows.device)
    found, cosines = [], []
    for part in torch.arange(len(rows), device=rows.device).split(_ROWS):
        cosine = unit[part] @ unit[kept].T
        itself = place[part]
        cosine[itself >= 0, itself[itself >= 0]] = -torch.inf
        best = top_latents(cosine, n)
        found.append(kept[best])
        cosines.append(cosine.gather(1, best))
        progress(int(part[-1]) + 1, len(rows))
    return torch.cat(found), torch.cat(cosines)


def layout(rows: Tensor, alive: Tensor) -> Tensor:
    """A map of the dictionary: the two principal components of the unit rows, float32 [M, 2].

    Of the latents that are alive; NaN for the others. Between -1 and 1. PCA and not a method that
    shows more clusters: it needs no library, no seed and no time, and distances mean something.
    """
    unit = nn.functional.normalize(rows.double(), dim=-1)
    kept = unit[alive]
    if len(kept) == 0:
        return unit.new_full((len(rows), 2), torch.nan).float()
    mean = kept.mean(dim=0)
    values, axes = torch.linalg.eigh((kept - mean).T @ (kept - mean))
    axes = axes[:, values.argsort(descending=True)[:2]]
    # An eigenvector's sign is arbitrary: its largest entry is positive.
    axes = axes * axes.gather(0, axes.abs().argmax(dim=0, keepdim=True)).sign()
    places = (unit - mean) @ axes
    places = nn.functional.pad(places, (0, 2 - places.shape[1]))
    places = places / places[alive].abs().amax().clamp(min=1e-12)
    return places.masked_fill(~alive[:, None], torch.nan).float()


@without_tf32()
def word_scores(clip: FrozenCLIP, rows: Tensor, words: Tensor) -> Tensor | None:
    """How well each latent's direction aligns with each word, cosines float32 [M, W].

    The tail of CLIP is not linear: there is no text that a row "means". What is taken is its direct
    path: the row, centred and weighted as the last layer norm would, times the projection. All
    texts have a large part in common, which says nothing: words are compared after subtracting
    their mean. None where the embedding is no linear map of a normed token (SigLIP's is pooled by
    attention). At the hook "embedding" it is no approximation.

    This is a logit lens (nostalgebraist 2020): the blocks behind the SAE's layer are left out, and
    at inner layers its words are known to mislead (Belrose et al., "Eliciting Latent Predictions
    from Transformers with the Tuned Lens", 2023, arXiv 2303.08112).

    Args:
        rows: decoder rows [M, d].
        words: text embeddings [W, e].
    """
    direct = clip.direct(rows)
    if direct is None:
        return None
    words = nn.functional.normalize(words.float(), dim=-1)
    words = nn.functional.normalize(words - words.mean(dim=0), dim=-1)
    return nn.functional.normalize(direct, dim=-1) @ words.T


def best_words(
    clip: FrozenCLIP, rows: Tensor, names: list[str], embeddings: Tensor | None, n: int
) -> Words:
    """The n words that each decoder row [M, d] aligns with most; none without embeddings [W, e], or
    where latents have no direct path to texts."""
    scores = None
    if embeddings is not None:
        scores = word_scores(clip, rows, embeddings.to(rows.device))
    if scores is None:
        nothing = torch.zeros(len(rows), 0)
        return Words([], nothing.long(), nothing)
    best = top_latents(scores, min(n, len(names)))
    return Words(names, best.cpu(), scores.gather(1, best).cpu())

"""How far a name can be trusted: does it tell images that the latent is active on from others?

A judge gives each held-out image a score for the name: CLIP the cosine of image and text. The
AUROC is the chance that an image on which the latent is active has a larger one than an image on
which it is not. (Detection, as in Paulo et al., "Automatically Interpreting Millions of Features in
Large Language Models", 2024, arXiv 2410.13928, with a graded answer.) Images that the name was
found on do not count. The names of other latents, in its place, are the control.

N images, M latents, V names, X images that are left out, p pairs of an image and a latent that is
active on it.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from clipsae.sae import SparseCodes

DRAWS = 4  # names of others that a latent is scored with
PERCENTILE = 0.95  # of their scores
_Z = 1.959964  # of a 95 % interval
_PAIRS = 2**20  # that are compared with the images left out at a time
_NAMES = 256  # ranked at a time


def mid_ranks(scores: Tensor) -> Tensor:
    """Ranks of each row's scores from 1, equal ones sharing the mean of theirs: [V, N] -> float32
    [V, N], exact for N below 2^23."""
    parts = []
    for part in scores.split(_NAMES):
        ordered, order = part.sort(dim=1)
        below = torch.searchsorted(ordered, ordered)
        upto = torch.searchsorted(ordered, ordered, right=True)
        rank = (below + upto + 1).float() / 2
        parts.append(torch.empty_like(rank).scatter_(1, order, rank))
    return torch.cat(parts)


def detection(
    codes: SparseCodes, left_out: Tensor, ranks: Tensor, name: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """AUROC of each latent's name, by mid-ranks: ties count one half.

    Args:
        codes: [N, M]; a latent is active on an image where its code is positive.
        left_out: LongTensor [M, X], rows of images that do not count for a latent, each once; -1:
            none.
        ranks: [V, N], `mid_ranks` of the judge's scores.
        name: LongTensor [M], each latent's name among the V; -1: none.

    Returns:
        float64 [M], NaN without a name, or where all images count that count are active or none
        is; and how many images count, LongTensor [M] active, [M] not active.
    """
    shown = codes.values > 0
    token, latent = codes.token[shown].long(), codes.latent[shown].long()
    total, latents = codes.tokens, codes.latents
    at = name.clamp(min=0)
    apart = left_out >= 0
    ranks_apart = ranks[at[:, None], left_out.clamp(min=0)].masked_fill(~apart, torch.nan)
    sums = torch.zeros(latents, dtype=torch.float64)
    active = torch.zeros(latents, dtype=torch.long)
    for of_image, of_latent in zip(token.split(_PAIRS), latent.split(_PAIRS), strict=True):
        counts = (left_out[of_latent] != of_image[:, None]).all(dim=1)
        of_image, of_latent = of_image[counts], of_latent[counts]
        rank = ranks[at[of_latent], of_image]
        # The rank among those that count: without the images left out that lie below, and half of
        # those that are equal.
        others = ranks_apart[of_latent]
        lower = (others < rank[:, None]).sum(dim=1) + (others == rank[:, None]).sum(dim=1) / 2
        sums.index_add_(0, of_latent, (rank - lower).double())
        active += torch.bincount(of_latent, minlength=latents)
    inactive = total - apart.sum(dim=1) - active
    area = (sums - active * (active + 1) / 2) / (active * inactive)
    return torch.where(name >= 0, area, torch.nan), active, inactive


def interval(area: Tensor, active: Tensor, inactive: Tensor) -> tuple[Tensor, Tensor]:
    """The 95 % interval of AUROCs (Newcombe 2006, "Confidence intervals for an effect size measure
    based on the Mann-Whitney statistic", part 2, method 5).

    Hanley and McNeil's (1982) variance, with m = (active + inactive) / 2 - 1 in place of both,

        V(t) = t (1 - t) (1 + m (1 - t) / (2 - t) + m t / (1 + t)) / (active * inactive),

    and as in Wilson's interval of a share that of the t themselves: (area - t)^2 = z^2 V(t). So an
    AUROC of 1 on a single image is not certain.

    Args:
        area: float64 [M]; NaN: not defined.
        active: LongTensor [M], images on which the latent is active.
        inactive: LongTensor [M], the others.

    Returns:
        The ends, float64 [M] each; NaN where `area` is.
    """
    pairs = (active * inactive).clamp(min=1).double()
    m = (active + inactive).double() / 2 - 1

    def outside(t: Tensor) -> Tensor:
        variance = t * (1 - t) * (1 + m * (1 - t) / (2 - t) + m * t / (1 + t)) / pairs
        return (area - t).square() > _Z**2 * variance

    ends = []
    for bound in (0.0, 1.0):  # halving between the bound, which is outside, and the AUROC
        far, near = torch.full_like(area, bound), area
        for _ in range(50):
            middle = (far + near) / 2
            out = outside(middle)
            far, near = torch.where(out, middle, far), torch.where(out, near, middle)
        ends.append(near.clamp(0, 1))
    return ends[0], ends[1]


def summary(
    area: Tensor, active: Tensor, inactive: Tensor, others: Tensor
) -> dict[str, Tensor | float]:
    """`score`, `low`, `high`, `control` and `threshold` of `clipsae.naming.Names`.

    Args:
        area: as of `interval`, as the next two.
        active: see there.
        inactive: see there.
        others: [draws, M], AUROCs with other latents' names; NaN: not defined.
    """
    low, high = interval(area, active, inactive)
    known = others[others.isfinite()]
    return {
        "score": area.float(),
        "low": low.float(),
        "high": high.float(),
        "control": others.mean(dim=0).float(),
        "threshold": float(known.quantile(PERCENTILE)) if len(known) else 1.0,
    }


def numbered(text: Sequence[str]) -> tuple[list[str], Tensor]:
    """The names that differ, V of them, and which of these each latent has.

    Args:
        text: M names, "": none.

    Returns:
        The names in order; LongTensor [M], -1: none.
    """
    names = sorted(set(text) - {""})
    place = {one: i for i, one in enumerate(names)} | {"": -1}
    return names, torch.tensor([place[one] for one in text])


def names_of_others(name: Tensor, draws: int = DRAWS, seed: int = 0) -> Tensor:
    """For each latent the names of other latents, drawn among those that have one; never its own.

    Args:
        name: LongTensor [M], which name; -1: none.

    Returns:
        LongTensor [draws, M]; -1 for a latent without a name, or if all have the same.
    """
    generator = torch.Generator().manual_seed(seed)
    named = (name >= 0).nonzero().squeeze(1)
    ordered, order = name[named].sort(stable=True)
    first = torch.searchsorted(ordered, ordered)
    same = torch.searchsorted(ordered, ordered, right=True) - first
    others = len(named) - same
    found = name.new_full((draws, len(name)), -1)
    for row in found:
        drawn = (torch.rand(len(named), generator=generator, dtype=torch.float64) * others).long()
        drawn = drawn + same * (drawn >= first)  # past those of the same name
        row[named[order]] = torch.where(
            others > 0, ordered[drawn.clamp(max=max(len(named) - 1, 0))], -1
        )
    return found

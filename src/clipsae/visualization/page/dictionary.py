"""Decoder rows of a dictionary: which are alike, and how they lie.

M latents, A those that are alive, d width.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from clipsae.evaluation.ranking import top_latents
from clipsae.sae.dense import without_tf32

_ROWS = 1024  # compared with all others at a time


@without_tf32()
def nearest(
    rows: Tensor,
    alive: Tensor,
    n: int,
    *,
    among: Tensor | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[Tensor, Tensor]:
    """Each latent's nearest among those that are alive, by the cosine of decoder rows.

    Args:
        rows: [M, d].
        alive: BoolTensor [M], or of the rows of `among`.
        among: rows of another SAE, of whose latents the nearest are wanted; None: the others of the
            same one.
        progress: called with (rows done, M).

    Returns:
        LongTensor [M, n'] and cosines float32 [M, n'], descending; n' = min(n, A - 1), at least 0,
        and min(n, A) among those of another SAE.
    """
    unit = nn.functional.normalize(rows.float(), dim=-1)
    others = unit if among is None else nn.functional.normalize(among.float(), dim=-1)
    kept = alive.nonzero().squeeze(1)
    n = max(0, min(n, len(kept) - (among is None)))
    place = torch.full((len(rows),), -1, device=rows.device)
    if among is None:
        place[kept] = torch.arange(len(kept), device=rows.device)
    found, cosines = [], []
    for part in torch.arange(len(rows), device=rows.device).split(_ROWS):
        cosine = unit[part] @ others[kept].T
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
def by_chance(rows: Tensor) -> float:
    """The cosine with the nearest of some rows [A, d] that 95 % of random directions stay below."""
    if not len(rows):
        return 1.0
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(_ROWS, rows.shape[1], generator=generator)
    unit = nn.functional.normalize(rows.float().cpu(), dim=-1)
    cosine = (nn.functional.normalize(drawn, dim=-1) @ unit.T).amax(dim=1)
    return cosine.quantile(0.95).item()

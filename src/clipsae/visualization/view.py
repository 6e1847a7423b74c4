"""What an SAE sees in one image.

T tokens of an image, P = T - 1 patches, M latents, S image side.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from clipsae.clip import FrozenCLIP
from clipsae.evaluation.passes import pool_codes
from clipsae.evaluation.ranking import top_latents
from clipsae.visualization.references import References

FILTERS = ("frequency", "strength", "none")
DARK = 30 / 255  # brightness of the patches where a latent is not active


@dataclass(frozen=True)
class View:
    """One image through one SAE.

    Attributes:
        means: float32 [M], codes averaged over all tokens, the class token included.
        shown: BoolTensor [M], the latents that the filter lets pass.
        marked: the latents with the largest positive means among those, descending.
        patches: float32 [marked, P], their codes on the patches.
    """

    means: Tensor
    shown: Tensor
    marked: list[int]
    patches: Tensor


def passes_filter(
    references: References, kind: str, *, max_frequency: float, max_strength: float
) -> Tensor:
    """The latents that are worth showing, BoolTensor [M].

    Args:
        kind: "frequency" leaves out those active on a larger share of the images than
            `max_frequency`: they say little about any one image. "strength" is the released code's
            filter: it leaves out those whose mean activation, over the images where they are
            active, is above `max_strength` (strong rare latents, too). "none" leaves out none.

    Raises:
        ValueError: another filter.
    """
    if kind == "frequency":
        return references.frequency <= max_frequency
    if kind == "strength":
        return references.strength <= max_strength
    if kind == "none":
        return torch.ones_like(references.frequency, dtype=torch.bool)
    raise ValueError(f"filter={kind!r}: expected one of {', '.join(FILTERS)}")


@torch.no_grad()
def look(clip: FrozenCLIP, sae: nn.Module, image: Tensor, shown: Tensor, top: int) -> View:
    """Encode one image and mark its strongest latents.

    Args:
        sae: in eval mode, on the device of `clip`.
        image: uint8 [3, S, S].
        shown: BoolTensor [M], the latents that may be marked.
        top: how many are marked, at most.
    """
    codes = sae.encode(clip.prefix(clip.normalize(image[None])))
    means = pool_codes(codes)[0].cpu()
    allowed = means.masked_fill(~shown, 0)
    best = top_latents(allowed[None], min(top, len(means)))[0]
    marked = [int(m) for m in best if allowed[m] > 0]
    patches = codes[0, clip.prefix_tokens :][:, marked].T.float().cpu()
    return View(means, shown, marked, patches)


def darkened(image: Tensor, patches: Tensor, grid: tuple[int, int]) -> Tensor:
    """An image whose patches are dark where a latent is not active.

    Args:
        image: uint8 [3, S, S].
        patches: [P], the latent's codes, or anything that is above 0 where it is active.
        grid: (rows, columns) of patches.

    Returns:
        uint8 [3, S, S]; patches are enlarged to the nearest pixels.
    """
    mask = (patches > 0).float().view(1, 1, *grid)
    mask = nn.functional.interpolate(mask, image.shape[-2:], mode="nearest")[0]
    return (image * (DARK + (1 - DARK) * mask)).round().to(torch.uint8)

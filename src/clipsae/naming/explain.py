"""Names by an explainer that looks at examples, and by it whether they are true of other images.

M latents, K and R images of each, P patches, N images.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from clipsae.naming.activity import Activity
from clipsae.naming.detection import names_of_others, numbered, summary
from clipsae.naming.explainers import Evidence, Example, Explainer
from clipsae.naming.regions import crop, regions
from clipsae.sae import SparseCodes

SHOWN = 5  # of the strongest images, and of the sample, that an explainer sees
DETECTED = 20  # images on which a latent is active, and as many on which it is not


@dataclass(frozen=True)
class Shown:
    """Images of each latent that an explainer may see.

    Attributes:
        index: LongTensor [M, K], images of the dataset, the strongest first; -1: none.
        values: [M, K], a latent's mean code over the tokens of each.
        maps: uint8 [M, K, P], where in them it is active (`References.maps`).
    """

    index: Tensor
    values: Tensor
    maps: Tensor

    def of(self, latent: int, dataset: Any, grid: tuple[int, int]) -> list[Example]:
        """The first `SHOWN` of a latent's images, read."""
        found = []
        for slot, index in enumerate(self.index[latent, :SHOWN].tolist()):
            if index < 0:
                break
            image, heat = dataset[index][0], self.maps[latent, slot]
            pixels = [image.shape[1] // grid[0], image.shape[2] // grid[1]]
            part = crop(image, regions(heat[None], grid)[0], pixels)
            strength = float(self.values[latent, slot])
            found.append(Example(index, image, part, heat.view(grid) / 255, strength))
        return found


def leading(codes: SparseCodes, n: int | None) -> list[int]:
    """The n latents with the largest sum of codes over the images [N, M], those that a
    reconstruction needs most; None: all that are active. Of equals the smaller first; latents that
    are active on every image, whose name no image could disprove, come last."""
    shown = codes.values > 0
    latent, values = codes.latent[shown].long(), codes.values[shown].double()
    mass = torch.zeros(codes.latents, dtype=torch.float64).index_add_(0, latent, values)
    order = mass.sort(descending=True, stable=True).indices[: int((mass > 0).sum())]
    everywhere = torch.bincount(latent, minlength=codes.latents)[order] == codes.tokens
    return torch.cat((order[~everywhere], order[everywhere]))[:n].tolist()


def describe(
    explainer: Explainer,
    latents: Sequence[int],
    dataset: Any,
    grid: tuple[int, int],
    top: Shown,
    sample: Shown,
    progress: Callable[[int, int], None],
) -> dict[int, str]:
    """What the explainer says of each latent; "" for nothing.

    Args:
        top: the images that latents are most active on.
        sample: images drawn from all that they are active on; those among `top` are left out.
    """
    said = {}
    for done, latent in enumerate(latents):
        strongest = top.of(latent, dataset, grid)
        seen = {example.index for example in strongest}
        others = [one for one in sample.of(latent, dataset, grid) if one.index not in seen]
        said[latent] = explainer.describe(Evidence(latent, strongest, others))
        progress(done + 1, len(latents))
    return said


def detect(
    explainer: Explainer,
    text: Sequence[str],
    latents: Sequence[int],
    dataset: Any,
    grid: tuple[int, int],
    activity: Activity,
    left_out: Tensor,
    progress: Callable[[int, int], None],
    seed: int = 0,
) -> dict[str, Any]:
    """How well the explainer tells by a name which images a latent is active on, on up to
    `DETECTED` of either kind, in random order; and by another latent's name on the same images.

    Its answers are yes and no, of which the AUROC is the balanced accuracy, (share of the active
    images it finds + share of the others it leaves) / 2.

    Args:
        text: M names, "": none.
        left_out: LongTensor [M, X], rows of `activity` that do not count; -1: none.

    Returns:
        `clipsae.naming.detection.summary` of them; scores are NaN for other latents than `latents`,
        and where there are no images of a kind.
    """
    codes, size = activity.codes, len(text)
    names, own = numbered(text)
    (other,) = names_of_others(own, draws=1, seed=seed)
    areas = torch.full((2, size), torch.nan, dtype=torch.float64)
    counts = torch.ones(2, size, dtype=torch.long)
    for done, latent in enumerate(latents):
        progress(done + 1, len(latents))
        active = torch.zeros(codes.tokens, dtype=torch.bool)
        active[codes.token[(codes.latent == latent) & (codes.values > 0)].long()] = True
        free = torch.ones_like(active)
        free[left_out[latent][left_out[latent] >= 0]] = False
        generator = torch.Generator().manual_seed(seed + latent)
        drawn = []
        for kind in (active & free, ~active & free):
            rows = kind.nonzero().squeeze(1)
            drawn.append(rows[torch.randperm(len(rows), generator=generator)[:DETECTED]])
        if not text[latent] or not len(drawn[0]) or not len(drawn[1]):
            continue
        rows = torch.cat(drawn)
        rows = rows[torch.randperm(len(rows), generator=generator)]
        truth = active[rows]
        counts[:, latent] = torch.tensor([len(drawn[0]), len(drawn[1])])
        nowhere = torch.zeros(grid)
        examples = []
        for index in activity.indices[rows].tolist():
            image = dataset[index][0]
            examples.append(Example(index, image, image, nowhere))
        for row, name in enumerate((text[latent], names[other[latent]])):
            if row and other[latent] < 0:
                continue
            said = torch.tensor(explainer.detect(name, examples))
            found, left = said[truth].double().mean(), (~said[~truth]).double().mean()
            areas[row, latent] = (found + left) / 2
    return summary(areas[0], counts[0], counts[1], areas[1:])

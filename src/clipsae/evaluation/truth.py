"""Ground truth as concepts: named boolean columns, for images and for patches.

For datasets that know what their images show. Those with a mask of classes for each image, as
`clipsae.data.MaskList`, know it of patches: they have `concepts`, the values of each attribute, and
the method `patch_truth(indices, grid)`. `clipsae.data.scenes.ScenesDataset` knows it of whole
images and their objects, too: it also has the method `attributes(indices)`.

n images, P patches of an image, V concepts.
"""

from collections.abc import Sequence
from math import log
from typing import Any

import torch
from torch import Tensor, nn

from clipsae.data import scenes

_VALUES = {
    "shape": tuple(scenes.SHAPES),
    "colour": tuple(scenes.COLOURS),
    "pattern": tuple(scenes.PATTERNS),
    "size": tuple(scenes.SIZES),
    "background": tuple(scenes.BACKGROUNDS),
    "position": tuple(scenes.POSITIONS),
    "count": tuple(scenes.COUNTS),
}
IMAGE_ATTRIBUTES = tuple(_VALUES)
OBJECT_ATTRIBUTES = ("shape", "colour", "pattern", "size")
PATCH_ATTRIBUTES = (*OBJECT_ATTRIBUTES, "background")


def has_truth(dataset: Any) -> bool:
    """Whether a dataset knows what its images show."""
    return hasattr(dataset, "attributes") and hasattr(dataset, "patch_truth")


def has_patch_truth(dataset: Any) -> bool:
    """Whether a dataset knows what each patch of its images shows."""
    return hasattr(dataset, "concepts") and hasattr(dataset, "patch_truth")


def patch_concept_names(dataset: Any) -> list[str]:
    """The V columns of `patch_concepts`: "shape=circle", ..."""
    return [f"{name}={value}" for name, values in dataset.concepts.items() for value in values]


def concept_names(attributes: Sequence[str]) -> list[str]:
    """The V columns: "shape=circle", ..."""
    return [f"{name}={value}" for name in attributes for value in _VALUES[name]]


def concept_words() -> list[str]:
    """What each concept of `concept_names(IMAGE_ATTRIBUTES)` is called in texts: "circle", ...,
    "one object"."""
    return [word for name in IMAGE_ATTRIBUTES for word in scenes.KINDS[name].classnames]


def image_concepts(dataset: Any, indices: Tensor) -> Tensor:
    """What is anywhere in each image: bool [n, V] of `concept_names(IMAGE_ATTRIBUTES)`."""
    truth = dict(dataset.attributes(indices.cpu()))
    truth["count"] = truth["count"] - 1  # one object is value 0
    columns = []
    for name in IMAGE_ATTRIBUTES:
        values = truth[name].reshape(len(indices), -1)  # a column for each object
        columns.append((values[:, :, None] == torch.arange(len(_VALUES[name]))).any(dim=1))
    return torch.cat(columns, dim=1)


def patch_concepts(dataset: Any, indices: Tensor, grid: int) -> Tensor:
    """What is in each patch: bool [n, P, V] of `patch_concept_names(dataset)`, P = grid^2.

    A patch has the attributes of what covers enough of it. In scenes that is an object, else the
    image's background.
    """
    indices = indices.cpu()
    truth = dict(dataset.patch_truth(indices, grid=grid))
    if has_truth(dataset):
        background = dataset.attributes(indices)["background"][:, None].expand_as(truth["object"])
        truth["background"] = background.masked_fill(truth["object"] >= 0, -1)
    columns = [
        truth[name][:, :, None] == torch.arange(len(values))
        for name, values in dataset.concepts.items()
    ]
    return torch.cat(columns, dim=2)


def patch_coverage(dataset: Any, indices: Tensor, grid: int) -> Tensor:
    """How much of each patch its foremost object covers: float [n, P] in 0..1, P = grid^2."""
    return dataset.patch_truth(indices.cpu(), grid=grid)["coverage"]


def patch_objects(dataset: Any, indices: Tensor, grid: int) -> Tensor:
    """Which of its image's objects covers enough of each patch: LongTensor [n, P], -1: none."""
    return dataset.patch_truth(indices.cpu(), grid=grid)["object"]


def bits_over_chance(
    mass: Tensor, total: Tensor, squares: Tensor, base: Tensor
) -> tuple[Tensor, Tensor]:
    """How much of a latent's activation lies on a concept, and what that tells, in bits.

    A concept is compared with its siblings: "size=large" with other sizes, and not with the
    background, on which no latent of objects lies. With p the share of the latent's activation on
    the rows (patches, images) with any size that lies on large ones, and b the share of those rows
    that are large, the score is the divergence

        D(p || b) = p log2(p / b) + (1 - p) log2((1 - p) / (1 - b))   where p > b,

    the bits that the latent's activity tells of the concept. The lift p / b alone would prefer rare
    concepts (20 % where chance gives 2 % to 95 % where it gives 15 %), and p - b common ones.
    Unlike AUROC it does not depend on how often the latent is active: latents of a large dictionary
    are rarer than their concepts.

    Few observations count for less: of p the lower end of Wilson's interval (z = 2) is taken, with
    Kish's effective number of observations, total^2 / squares.

    Args:
        mass: [M, V], activation summed over the rows that show the concept.
        total, squares: [M, V], activation and its square summed over the rows that have the
            concept's attribute.
        base: [V], share of those rows that show the concept.

    Returns:
        p and the bits, float64 [M, V]; both 0 for latents that are never active there, the bits
        for concepts that all or none of those rows have.
    """
    z2 = 4.0
    p = mass / torch.where(total > 0, total, 1)
    n = (total.square() / torch.where(squares > 0, squares, 1)).clamp(min=1e-9)
    spread = (z2 * (p * (1 - p)).clamp(min=0) / n + z2**2 / (4 * n**2)).sqrt()
    low = ((p + z2 / (2 * n) - spread) / (1 + z2 / n)).clamp(0, 1)
    bits = (torch.xlogy(low, low / base) + torch.xlogy(1 - low, (1 - low) / (1 - base))) / log(2)
    above_chance = (total > 0) & (low > base) & (base > 0) & (base < 1)
    return p, torch.where(above_chance, bits, 0)


class AttributeEncoder(nn.Module):
    """An "image encoder" that knows: an image's concepts as 0 and 1, of unit length.

    With it MonoSemanticity measures how much of the ground truth the images of a latent share; its
    level is not comparable with a trained encoder's.
    """

    name = "attributes"

    def __init__(self, dataset: Any) -> None:
        super().__init__()
        self.dataset = dataset

    def forward(self, images: Tensor, indices: Tensor) -> Tensor:
        """Images [B, 3, S, S], which are not used, and their indices [B] -> [B, V]."""
        concepts = image_concepts(self.dataset, indices).float()
        return nn.functional.normalize(concepts, dim=-1).to(images.device)

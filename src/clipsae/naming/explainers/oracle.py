"""Names by ground truth: the ceiling for every other way to name."""

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch

from clipsae.errors import ConfigError
from clipsae.evaluation.truth import (
    IMAGE_ATTRIBUTES,
    bits_over_chance,
    concept_names,
    concept_words,
    has_truth,
    image_concepts,
    patch_concept_names,
    patch_concepts,
)
from clipsae.naming.explainers.base import EXPLAINERS, Evidence, Example, Explainer

LEAST_BITS = 0.2  # from which a concept stands out
_BASE_IMAGES = 500  # from which base rates are taken


@EXPLAINERS.register("oracle")
class Oracle(Explainer):
    """Reads what the scenes show: the concept on which most of a latent's activity lies, by
    `bits_over_chance` over the patches of its examples, or for position and count over the images.

    Args:
        dataset: of the examples.

    Raises:
        ConfigError: a dataset without ground truth.
    """

    source = "oracle"

    def __init__(self, *, dataset: Any) -> None:
        if not has_truth(dataset):
            raise ConfigError(
                f"naming.explainer=oracle on {getattr(dataset, 'name', dataset)!r}: expected a "
                "dataset with ground truth, such as the built-in scenes"
            )
        self.dataset = dataset
        self.words = dict(zip(concept_words(), concept_names(IMAGE_ATTRIBUTES), strict=True))
        self.concepts = list(self.words.values())
        self._of_patches = patch_concept_names(dataset)
        self._of_images = [name for name in self.concepts if name not in self._of_patches]
        some = torch.arange(min(_BASE_IMAGES, len(dataset)))
        self._some_images = image_concepts(dataset, some)
        self._some_patches = cache(lambda grid: patch_concepts(dataset, some, grid).flatten(0, 1))

    def describe(self, evidence: Evidence) -> str:
        examples = [*evidence.top, *evidence.sample]
        if not examples:
            return ""
        indices = torch.tensor([example.index for example in examples])
        grid = examples[0].heat.shape[0]
        heat = torch.stack([example.heat for example in examples]).double().flatten(1)
        truth = patch_concepts(self.dataset, indices, grid)  # [n, P, V]
        some = self._some_patches(grid)
        bits = [_bits(self._of_patches, heat.flatten(), truth.flatten(0, 1), some)]
        strengths = torch.tensor([example.strength for example in examples]).double()
        columns = [self.concepts.index(name) for name in self._of_images]
        bits.append(
            _bits(
                self._of_images,
                strengths,
                image_concepts(self.dataset, indices)[:, columns],
                self._some_images[:, columns],
            )
        )
        scores = torch.cat(bits)
        best = int(scores.argmax())
        if scores[best] < LEAST_BITS:
            return ""
        concept = [*self._of_patches, *self._of_images][best]
        return next(word for word, name in self.words.items() if name == concept)

    def detect(self, name: str, examples: Sequence[Example]) -> list[bool]:
        if name not in self.words:
            return [False for _ in examples]
        indices = torch.tensor([example.index for example in examples])
        column = self.concepts.index(self.words[name])
        return image_concepts(self.dataset, indices)[:, column].tolist()


def _bits(
    names: Sequence[str], weights: torch.Tensor, truth: torch.Tensor, some: torch.Tensor
) -> torch.Tensor:
    """Bits of each concept [V], of rows with weights [n] and truth [n, V], where `some` [m, V] is
    what rows show anywhere."""
    kinds = [name.split("=")[0] for name in names]
    siblings = torch.tensor([[a == b for b in kinds] for a in kinds])  # [V, V]
    has = (truth.float() @ siblings.float()) > 0  # rows with any value of the concept's attribute
    some_has = (some.float() @ siblings.float()) > 0
    base = some.sum(dim=0) / some_has.sum(dim=0).clamp(min=1)
    mass, total = weights @ truth.double(), weights @ has.double()
    squares = weights.square() @ has.double()
    _, bits = bits_over_chance(mass[None], total[None], squares[None], base.double())
    return (bits * total / weights.sum().clamp(min=1e-12))[0]

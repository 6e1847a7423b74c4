"""Names against ground truth, on the built-in scenes: by what is there, and by who is named right.

M latents, V concepts, L latents of each, N images.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from clipsae.evaluation.truth import (
    IMAGE_ATTRIBUTES,
    concept_names,
    concept_words,
    image_concepts,
)

_SHUFFLES = 20


def truth_judge(dataset: Any, indices: Tensor, texts: Sequence[str]) -> Tensor:
    """On which images names are true: float32 [V, N] of 0 and 1.

    Args:
        dataset: with ground truth of its images (`clipsae.evaluation.truth.has_truth`).
        indices: LongTensor [N].
        texts: V names; one that is no concept's word is true nowhere.
    """
    there = image_concepts(dataset, indices).T.float()
    row = {word: i for i, word in enumerate(concept_words())}
    nowhere = torch.zeros(len(indices))
    return torch.stack([there[row[text]] if text in row else nowhere for text in texts])


def named_right(
    text: Sequence[str], concepts: Sequence[str], leading: Tensor, concept: Tensor
) -> dict[str, float]:
    """For how many concepts the latent that says most about them has their name.

    Args:
        text: M names.
        concepts: V, "colour=red", as `clipsae.evaluation.truth.concept_names` has them.
        leading: LongTensor [V, L], latents by what they say of each concept, -1: none.
        concept: LongTensor [M], the concept that each latent says most about, -1: none.

    Returns:
        `right`: the share, over the concepts that have a latent; `right_shuffled`: the same with
        the names of all latents that have one shuffled, the mean of 20 times; `right_oracle`: with
        each latent named by the truth, after the concept that it says most about, which may be
        another one; `concepts`: how many have a latent. Shares are NaN without any.
    """
    said = dict(zip(concept_names(IMAGE_ATTRIBUTES), concept_words(), strict=True))
    pairs = [(v, m) for v, m in enumerate(leading[:, 0].tolist()) if m >= 0]
    words = [said[name] for name in concepts]
    generator = torch.Generator().manual_seed(0)
    named = [m for m, name in enumerate(text) if name]
    shuffled = 0
    for _ in range(_SHUFFLES):
        order = torch.randperm(len(named), generator=generator).tolist()
        other = {m: text[named[i]] for m, i in zip(named, order, strict=True)}
        shuffled += sum(other.get(m) == words[v] for v, m in pairs)
    right = sum(text[m] == words[v] for v, m in pairs)
    oracle = sum(int(concept[m]) == v for v, m in pairs)
    total = len(pairs) or float("nan")
    return {
        "right": right / total,
        "right_shuffled": shuffled / _SHUFFLES / total,
        "right_oracle": oracle / total,
        "concepts": float(len(pairs)),
    }

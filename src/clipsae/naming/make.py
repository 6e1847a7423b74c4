"""Names of all latents of a dictionary, with their scores: two passes over images, whatever the
number of latents.

M latents, K examples of each, N images, V names that differ, e embedding size.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from clipsae.clip import FrozenCLIP
from clipsae.clip.text import text_classifier
from clipsae.evaluation.passes import Progress
from clipsae.naming.activity import Activity, collect_activity
from clipsae.naming.detection import (
    detection,
    mid_ranks,
    names_of_others,
    numbered,
    summary,
)
from clipsae.naming.dissect import soft_wpmi
from clipsae.naming.explain import Shown, describe, detect, leading
from clipsae.naming.explainers import Explainer
from clipsae.naming.names import DISSECT, WORDS, Names
from clipsae.naming.regions import embed_examples
from clipsae.naming.truth import truth_judge
from clipsae.naming.vocabulary import PROMPTS, Vocabulary
from clipsae.sae import SAE


@dataclass(frozen=True)
class Explaining:
    """Who names latents by looking at their examples, and what it is shown.

    Attributes:
        top, sample: of all latents, see `describe`.
        requests: to a server, at most; None: any number. Those latents are named first that matter
            most (`leading`).
    """

    explainer: Explainer
    top: Shown
    sample: Shown
    requests: int | None = None

    def latents(self, activity: Activity, judge: str) -> list[int]:
        """The latents that the requests suffice for."""
        each = self.explainer.requests_of_a_latent(judge)
        limited = self.requests is not None and each > 0
        return leading(activity.codes, self.requests // each if limited else None)


JUDGES = ("clip", "truth", "explainer")
Judge = Callable[[Sequence[str]], Tensor]
"""V texts -> a score of each for each of N images, [V, N]: the larger, the truer."""


@torch.no_grad()
def name_latents(
    clip: FrozenCLIP,
    sae: SAE,
    dataset: Any,
    vocabulary: Vocabulary,
    index: Tensor,
    maps: Tensor | None = None,
    *,
    images: int | None = None,
    judge: str = "clip",
    explaining: Explaining | None = None,
    batch_size: int = 32,
    num_workers: int = 0,
    progress: Progress = lambda done, total, what: None,
) -> Names:
    """Name each latent after the word that fits its examples best, and score the names.

    Args:
        sae: moved to the device of `clip`.
        dataset: `labels` LongTensor, items (uint8 [3, S, S], label).
        index: LongTensor [M, K], the images that each latent is most active on, strongest first;
            -1: none (`References.index`).
        maps: uint8 [M, K, P], where in them (`References.maps`): the examples are these regions.
            None: the whole images.
        images: how many images names are scored on, evenly spaced over the classes, without a
            latent's own examples; None: all.
        judge: "clip", by the cosine of text and image; "truth", where the dataset has it;
            "explainer", the one that names, on the latents that it has named.
        explaining: who names instead, and how many latents; the others keep their word.
        progress: called with (done, total, what is being done).

    Raises:
        ConfigError: `clip` has no text tower.
        ValueError: no images, or another judge.
    """
    clip.require_text()
    if judge not in JUDGES:
        raise ValueError(f"judge={judge!r}: expected one of {', '.join(JUDGES)}")
    reading = {"batch_size": batch_size, "num_workers": num_workers}
    shown, place = embed_examples(
        clip, dataset, index, maps, **reading, progress=said(progress, "examples")
    )
    shown = shown.to(clip.device)
    best, scores = soft_wpmi(
        shown,
        place,
        vocabulary.embeddings,
        min(WORDS, len(vocabulary)),
        progress=said(progress, "naming latents"),
    )
    best, scores = best.cpu(), scores.cpu()
    activity = collect_activity(
        clip,
        sae,
        dataset,
        limit_images=images,
        **reading,
        progress=said(progress, "images that names are scored on"),
    )
    text = [vocabulary.words[i] if i >= 0 else "" for i in best[:, 0].tolist()]
    judges: dict[str, Judge] = {
        "clip": lambda texts: clip_judge(clip, vocabulary, activity.embeddings, texts),
        "truth": lambda texts: truth_judge(dataset, activity.indices, texts),
    }
    left_out, chosen = index, list[int]()
    explained = None
    if explaining is not None:
        chosen = explaining.latents(activity, judge)
        said_of = describe(
            explaining.explainer,
            chosen,
            dataset,
            clip.grid,
            explaining.top,
            explaining.sample,
            said(progress, "names by the explainer"),
        )
        explained = torch.zeros(len(text), dtype=torch.bool)
        explained[chosen] = True
        text = [said_of.get(m, word) for m, word in enumerate(text)]
        left_out = distinct(torch.cat((index, explaining.sample.index), dim=1))
    if judge == "explainer":
        assert explaining is not None
        scores_of = detect(
            explaining.explainer,
            text,
            chosen,
            dataset,
            clip.grid,
            activity,
            activity.places(left_out),
            said(progress, "detection by the explainer"),
        )
    else:
        scores_of = score_names(text, activity, left_out, judges[judge])
    return Names(
        vocabulary=vocabulary,
        best=best,
        best_scores=scores,
        text=text,
        **scores_of,
        judge=judge,
        source=DISSECT if explaining is None else explaining.explainer.source,
        explained=explained,
        examples=mean_examples(shown.cpu(), place),
    )


def distinct(index: Tensor) -> Tensor:
    """Images of each latent, LongTensor [M, X], each once: -1 in place of those that come again."""
    ordered, order = index.sort(dim=1, stable=True)
    again = torch.zeros_like(index, dtype=torch.bool)
    again[:, 1:] = ordered[:, 1:] == ordered[:, :-1]
    return torch.empty_like(index).scatter_(1, order, ordered.masked_fill(again, -1))


def said(progress: Progress, what: str) -> Callable[[int, int], None]:
    """A progress of one thing."""
    return lambda done, total: progress(done, total, what)


def clip_judge(
    clip: FrozenCLIP, vocabulary: Vocabulary, images: Tensor, texts: Sequence[str]
) -> Tensor:
    """Cosines of texts with images: unit embeddings [N, e] -> [V, N]. Texts that the vocabulary
    does not have are embedded in its plain prompts."""
    place = {word: i for i, word in enumerate(vocabulary.words)}
    rows = torch.zeros(len(texts), images.shape[1])
    new = [i for i, text in enumerate(texts) if text not in place]
    known = [i for i, text in enumerate(texts) if text in place]
    rows[known] = vocabulary.embeddings[[place[texts[i]] for i in known]]
    if new:
        rows[new] = text_classifier(clip, [texts[i] for i in new], PROMPTS).float().cpu()
    return rows @ images.T


def score_names(
    text: Sequence[str], activity: Activity, index: Tensor, judge: Judge
) -> dict[str, Any]:
    """Score the names of all latents, and those of others in their place.

    Args:
        text: M names, "": none.
        index: LongTensor [M, K], images of the dataset that a latent's name was found on, which do
            not count for it; -1: none.

    Returns:
        `score`, `low`, `high`, `control` and `threshold` of `Names`.
    """
    texts, name = numbered(text)
    left_out = activity.places(index)
    if not texts:
        nothing = torch.full((len(text),), torch.nan, dtype=torch.float64)
        return summary(nothing, torch.zeros_like(name), torch.zeros_like(name), nothing[None])
    ranks = mid_ranks(judge(texts))
    area, active, inactive = detection(activity.codes, left_out, ranks, name)
    others = torch.stack(
        [detection(activity.codes, left_out, ranks, one)[0] for one in names_of_others(name)]
    )
    return summary(area, active, inactive, others)


def mean_examples(shown: Tensor, place: Tensor) -> Tensor:
    """Each latent's mean example, of unit length: [E, e], LongTensor [M, K] -> [M, e]; 0 without
    examples."""
    there = place >= 0
    sums = torch.zeros(len(place), shown.shape[1])
    for k in range(place.shape[1]):
        rows = there[:, k]
        sums[rows] += shown[place[rows, k]]
    return nn.functional.normalize(sums, dim=-1)

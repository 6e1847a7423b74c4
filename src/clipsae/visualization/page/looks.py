"""Images through an SAE for the page: which latents fire where, what is predicted, and what
changes when a latent is switched off.

B images, T tokens of an image, M latents, C classes.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from clipsae.clip import FrozenCLIP
from clipsae.data.loader import image_batches
from clipsae.evaluation.passes import in_eval_mode, pool_codes
from clipsae.evaluation.ranking import top_latents
from clipsae.visualization.page.reasons import (
    PREDICTIONS,
    Reasons,
    likely_reasons,
    logits_without,
    margins,
    reasons_of,
    strongest_other,
)
from clipsae.visualization.references import References


@dataclass(frozen=True)
class Look:
    """One image through the SAE.

    Attributes:
        index, label: in the dataset.
        tokens: for each of T tokens, the class token first, its largest codes: (latents, codes).
        latents, means: the image's largest token means, descending.
        clip, sae: (class, probability) of the most likely classes, as CLIP says, and with the
            stream replaced by the SAE's reconstruction; none without a classifier.
        why: what the prediction rests on; None without a classifier.
    """

    index: int
    label: int
    tokens: list[tuple[list[int], list[float]]]
    latents: list[int]
    means: list[float]
    clip: list[tuple[int, float]]
    sae: list[tuple[int, float]]
    why: Reasons | None


@dataclass(frozen=True)
class Effects:
    """What single latents do for the true class of images, E pairs of a latent and a class.

    Attributes:
        latent, label: int64 [E], ascending by latent, then by class.
        change: float32 [E], by how much the margin of the true class, its logit less that of the
            strongest other class, is larger with the latent than without it alone: the mean over
            the images of the class that were looked at and that the latent is active on. Above
            zero the latent helps the class, below it hurts it. (The other class is that of the
            whole image.)
        images: int64 [E], how many those are.
    """

    latent: Tensor
    label: Tensor
    change: Tensor
    images: Tensor


@dataclass(frozen=True)
class Looks:
    """What `collect_looks` found.

    Attributes:
        images: the images that get a page, by ascending index.
        effects: what latents do for the true class; None if not wanted.
    """

    images: list[Look]
    effects: Effects | None


@torch.no_grad()
def collect_looks(
    clip: FrozenCLIP,
    sae: nn.Module,
    dataset: Any,
    classifier: Tensor | None,
    references: References,
    *,
    pages: list[int],
    effect_images: int,
    on_image: Callable[[int, Tensor], None] | None,
    per_token: int = 24,
    per_image: int = 40,
    why: int = 16,
    batch_size: int = 32,
    num_workers: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Looks:
    """One pass over the images that the page shows.

    Args:
        sae: on the device of `clip`.
        classifier: text embeddings [C, e], of unit length or not; None: nothing is predicted.
        pages: indices of the images that get a page.
        effect_images: a latent's effect on the true class is measured on the images with a page
            that it is active on, and on that many of its reference images; 0: not at all.
        on_image: called with the index and the pixels, uint8 [3, S, S], of each image that has a
            page or is a reference image; None: only what is computed on is read.
        per_token: codes of a token that are kept.
        per_image: latents of an image that are kept.
        why: latents of an image that are kept for each measure of `Reasons`. They are chosen
            among all that are active on the image, or with `effect_images=0`, where not all of them
            are switched off, among those whose effects are largest to first order.
        progress: called with (images done, images in all).
    """
    if classifier is None:
        effect_images = 0
    else:
        classifier = classifier.to(clip.device)
    wanted: dict[int, list[int]] = {}
    for latent, images in enumerate(references.index[:, :effect_images].tolist()):
        for index in images:
            if index >= 0:
                wanted.setdefault(index, []).append(latent)
    with_page = set(pages)
    computed_on = with_page | set(wanted)
    needed = set(computed_on)
    if on_image is not None:
        needed |= set(references.index[references.index >= 0].tolist())
    measured: list[tuple[Tensor, int, Tensor]] = []
    found: list[Look] = []
    done = 0
    with in_eval_mode([sae]):
        for pixels, labels, at in image_batches(dataset, batch_size, num_workers, sorted(needed)):
            if on_image is not None:
                for image, index in zip(pixels, at.tolist(), strict=True):
                    on_image(index, image)
            seen = [i for i, index in enumerate(at.tolist()) if index in computed_on]
            if not seen:
                continue
            streams = clip.prefix(clip.normalize(pixels[seen]))
            logits = [None] * len(seen) if classifier is None else clip.logits(streams, classifier)
            for stream, own, index, label in zip(
                streams, logits, at[seen].tolist(), labels[seen].tolist(), strict=True
            ):
                codes = sae.encode(stream[None])[0]
                shown, reasons = index in with_page, None
                if classifier is not None:
                    latents = torch.tensor(wanted.get(index, []), dtype=torch.long)
                    if shown and effect_images:  # the wanted ones are among them
                        latents = (pool_codes(codes[None])[0] > 0).nonzero().squeeze(1)
                    elif shown:
                        latents = likely_reasons(clip, sae, stream, codes, classifier, own, why)
                    latents = latents.to(codes.device)
                    without = logits_without(clip, sae, stream, codes, latents, classifier)
                    rival = strongest_other(own, label)
                    measured.append((latents, label, margins(own, without, label, rival)))
                    if shown:
                        reasons = reasons_of(own, codes, latents, without, label, why)
                if shown:
                    look = _look(clip, sae, stream, codes, own, classifier, per_token, per_image)
                    found.append(replace(look, index=index, label=label, why=reasons))
                done += 1
                if progress is not None:
                    progress(done, len(computed_on))
    return Looks(found, _averaged(measured) if effect_images else None)


def _averaged(measured: list[tuple[Tensor, int, Tensor]]) -> Effects:
    """The mean over the images of a class, from (latents [n], class, changes [n]) of each image."""
    if not measured:
        nothing = torch.zeros(0, dtype=torch.long)
        return Effects(nothing, nothing, nothing.float(), nothing)
    latents = torch.cat([latents.cpu() for latents, _, _ in measured])
    labels = torch.cat([torch.full((len(of),), label) for of, label, _ in measured])
    change = torch.cat([change.cpu() for _, _, change in measured]).double()
    pairs, place, images = torch.stack((latents, labels)).unique(
        dim=1, return_inverse=True, return_counts=True
    )
    total = torch.zeros(len(images), dtype=torch.float64).index_add_(0, place, change)
    return Effects(pairs[0], pairs[1], (total / images).float(), images)


def _look(
    clip: FrozenCLIP,
    sae: nn.Module,
    stream: Tensor,
    codes: Tensor,
    own: Tensor | None,
    classifier: Tensor | None,
    per_token: int,
    per_image: int,
) -> Look:
    """Without the index, the label and the reasons."""
    means = pool_codes(codes[None])[0]
    best = top_latents(means[None], min(per_image, len(means)))[0]
    best = best[means[best] > 0]
    of_token = top_latents(codes, min(per_token, codes.shape[1]))
    tokens = []
    for latents, values in zip(of_token, codes.gather(1, of_token), strict=True):
        kept = values > 0
        tokens.append((latents[kept].tolist(), values[kept].tolist()))
    said: list[tuple[int, float]] = []
    through = said
    if own is not None:
        said = likely(own)
        rebuilt = sae.decode(codes, sae.input_scale(stream))
        through = likely(clip.logits(rebuilt[None], classifier)[0])
    return Look(
        index=-1,
        label=-1,
        tokens=tokens,
        latents=best.tolist(),
        means=means[best].tolist(),
        clip=said,
        sae=through,
        why=None,
    )


def likely(logits: Tensor) -> list[tuple[int, float]]:
    """The most likely classes and their probabilities, from logits [C]."""
    probability = logits.softmax(dim=-1)
    top = probability.topk(min(PREDICTIONS, len(logits)))
    return list(zip(top.indices.tolist(), top.values.tolist(), strict=True))

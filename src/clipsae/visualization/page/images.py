"""Images through an SAE for the page: which latents are active where, what is predicted, and what
changes without a latent.

B images, T tokens of an image, M latents, C classes.
"""

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from clipsae.clip import FrozenCLIP
from clipsae.data.loader import image_batches
from clipsae.evaluation.interventions import (
    Interventions,
    Reasons,
    likely,
    margins,
    reasons_of,
    strongest_other,
)
from clipsae.evaluation.passes import covered, in_eval_mode, pool_codes, whole_codes
from clipsae.evaluation.ranking import top_latents
from clipsae.sae import SAE
from clipsae.visualization.references import References

PER_TOKEN, PER_IMAGE = 24, 40  # latents that are kept


@dataclass(frozen=True)
class ImageActivations:
    """One image through the SAE.

    Attributes:
        index, label: in the dataset.
        tokens: for each of T tokens, the class token first, its largest codes: (latents, codes).
        latents, means: the image's largest token means, descending.
        clip, sae: (class, probability) of the most likely classes, by CLIP, and with the stream
            replaced by the SAE's reconstruction; none without a classifier.
        why: why CLIP predicts its class; None without a classifier.
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
    """Effects of single latents on the true class of images, E pairs of a latent and a class.

    Attributes:
        latent, label: int64 [E], ascending by latent, then by class.
        change: float32 [E], by how much the margin of the true class, its logit less that of the
            strongest other class, is larger with the latent than without it alone: the mean over
            the images of the class that were used and that the latent is active on. Above zero the
            latent helps the class, below it hurts it. (The other class is that of the whole image.)
        images: int64 [E], how many those are.
    """

    latent: Tensor
    label: Tensor
    change: Tensor
    images: Tensor


@torch.no_grad()
def collect_activations(
    clip: FrozenCLIP,
    sae: SAE,
    dataset: Any,
    classifier: Tensor | None,
    references: References,
    *,
    pages: list[int],
    effect_images: int,
    on_image: Callable[[int, Tensor], None] | None,
    why: int = 16,
    batch_size: int = 32,
    num_workers: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[list[ImageActivations], Effects | None]:
    """One pass over the images that the page shows.

    Args:
        sae: on the device of `clip`.
        classifier: text embeddings [C, e], of unit length or not; None: nothing is predicted.
        pages: indices of the images that get a page.
        effect_images: a latent's effect on the true class is measured on the images with a page
            that it is active on, and on that many of its reference images; 0: not at all.
        on_image: called with the index and the pixels, uint8 [3, S, S], of each image that has a
            page or is a reference image; None: only images that are encoded are read.
        why: latents of an image that are kept for each measure of `Reasons`. They are chosen
            among all that are active on the image, or with `effect_images=0`, where not all of them
            are switched off, among those whose effects are largest to first order.
        progress: called with (images done, images in all).

    Returns:
        The images with a page, by ascending index; the effects, or None.
    """
    interventions = None
    if classifier is not None:
        interventions = Interventions(clip, sae, classifier.to(clip.device))
    else:
        effect_images = 0
    measured_on: dict[int, list[int]] = defaultdict(list)  # image -> latents
    for latent, images in enumerate(references.index[:, :effect_images].tolist()):
        for index in images:
            if index >= 0:
                measured_on[index].append(latent)
    with_page = set(pages)
    encoded = with_page | measured_on.keys()
    needed = set(encoded)
    if on_image is not None:
        needed |= set(references.index[references.index >= 0].tolist())
    measured: list[tuple[Tensor, int, Tensor]] = []
    found: list[ImageActivations] = []
    done = 0
    with in_eval_mode([sae]):
        for pixels, labels, at in image_batches(dataset, batch_size, num_workers, sorted(needed)):
            if on_image is not None:
                for image, index in zip(pixels, at.tolist(), strict=True):
                    on_image(index, image)
            kept = [i for i, index in enumerate(at.tolist()) if index in encoded]
            if not kept:
                continue
            streams, contexts = clip.prefix(clip.normalize(pixels[kept]), with_context=True)
            all_logits: Any = [None] * len(kept)
            if interventions is not None:
                all_logits = clip.logits(streams, interventions.classifier, contexts)
            for i, (stream, logits, index, label) in enumerate(
                zip(streams, all_logits, at[kept].tolist(), labels[kept].tolist(), strict=True)
            ):
                context = None if contexts is None else contexts[i]
                codes = whole_codes(clip, sae, stream[None])[0]
                has_page, reasons = index in with_page, None
                if interventions is not None:
                    latents = torch.tensor(measured_on.get(index, []), dtype=torch.long)
                    if has_page and effect_images:  # those of `measured_on` are among them
                        latents = (pool_codes(codes[None])[0] > 0).nonzero().squeeze(1)
                    elif has_page:
                        latents = interventions.likely_reasons(stream, codes, logits, why, context)
                    latents = latents.to(codes.device)
                    without = interventions.logits_without(stream, codes, latents, context)
                    rival = strongest_other(logits, label)
                    measured.append((latents, label, margins(logits, without, label, rival)))
                    if has_page:
                        reasons = reasons_of(logits, codes, latents, without, label, why)
                if has_page:
                    said: tuple[list[tuple[int, float]], ...] = ([], [])
                    if interventions is not None:
                        through = _through(interventions, stream, codes, context)
                        said = (likely(logits), likely(through))
                    strongest = _strongest(codes)
                    found.append(ImageActivations(index, label, *strongest, *said, reasons))
                done += 1
                progress(done, len(encoded))
    return found, _averaged(measured) if effect_images else None


@torch.no_grad()
def image_activations(
    interventions: Interventions, image: Tensor, *, why: int = 16
) -> ImageActivations:
    """One image through the SAE, of no dataset: index and label are -1.

    Args:
        image: uint8 [3, S, S].
        why: as of `collect_activations`; chosen by effects to first order.
    """
    clip, sae = interventions.clip, interventions.sae
    with in_eval_mode([sae]):
        streams, contexts = clip.prefix(clip.normalize(image[None]), with_context=True)
        stream, context = streams[0], None if contexts is None else contexts[0]
        codes = whole_codes(clip, sae, streams)[0]
        logits = clip.logits(streams, interventions.classifier, contexts)[0]
        latents = interventions.likely_reasons(stream, codes, logits, why, context)
        without = interventions.logits_without(stream, codes, latents, context)
        reasons = reasons_of(logits, codes, latents, without, int(logits.argmax()), why)
        through = _through(interventions, stream, codes, context)
    return ImageActivations(-1, -1, *_strongest(codes), likely(logits), likely(through), reasons)


def _through(
    interventions: Interventions, stream: Tensor, codes: Tensor, context: Tensor | None
) -> Tensor:
    """The logits [C] of an image whose stream is replaced by the SAE's reconstruction."""
    clip, sae = interventions.clip, interventions.sae
    own = clip.token_slice(sae.config["tokens"])
    rebuilt, there = stream.clone(), covered(clip, sae, stream[None])
    rebuilt[own] = sae.decode(codes[own], sae.input_scale(stream[own]))
    if there is not None:
        rebuilt = torch.where(there[0, :, None], rebuilt, stream)
    beside = None if context is None else context[None]
    return clip.logits(rebuilt[None], interventions.classifier, beside)[0]


def _strongest(
    codes: Tensor,
) -> tuple[list[tuple[list[int], list[float]]], list[int], list[float]]:
    """`tokens`, `latents` and `means` of an image with codes [T, M]."""
    of_token = top_latents(codes, min(PER_TOKEN, codes.shape[1]))
    tokens = []
    for latents, values in zip(of_token, codes.gather(1, of_token), strict=True):
        kept = values > 0
        tokens.append((latents[kept].tolist(), values[kept].tolist()))
    means = pool_codes(codes[None])[0]
    best = top_latents(means[None], min(PER_IMAGE, len(means)))[0]
    best = best[means[best] > 0]
    return tokens, best.tolist(), means[best].tolist()


def _averaged(measured: list[tuple[Tensor, int, Tensor]]) -> Effects:
    """The mean over the images of a class, from (latents [n], class, changes [n]) of each image."""
    latents = torch.cat([torch.zeros(0, dtype=torch.long), *(m.cpu() for m, _, _ in measured)])
    labels = torch.cat([latents[:0], *(torch.full((len(m),), label) for m, label, _ in measured)])
    changes = torch.cat([torch.zeros(0), *(change.cpu() for _, _, change in measured)]).double()
    pairs, place, images = torch.stack((latents, labels)).unique(
        dim=1, return_inverse=True, return_counts=True
    )
    total = torch.zeros(len(images), dtype=torch.float64).index_add_(0, place, changes)
    return Effects(pairs[0], pairs[1], (total / images).float(), images)

"""Images through an SAE for the page: which latents fire where, what is predicted, and what
changes when a latent is switched off.

B images, T tokens of an image, d width, M latents, C classes, n latents.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from clipsae.clip import FrozenCLIP
from clipsae.clip.changes import Changes
from clipsae.data.loader import image_batches
from clipsae.evaluation.metrics import pool_codes
from clipsae.evaluation.passes import in_eval_mode
from clipsae.evaluation.ranking import top_latents
from clipsae.visualization.references import References

_STREAMS = 64  # token streams that go through the tail together
PREDICTIONS = 5


@dataclass(frozen=True)
class Look:
    """One image through the SAE.

    Attributes:
        index, label: in the dataset.
        tokens: for each of T tokens, the class token first, its largest codes: (latents, codes).
        latents, means: the image's largest token means, descending.
        clip, sae: (class, probability) of the most likely classes, as CLIP says, and with the
            stream replaced by the SAE's reconstruction; none without a classifier.
        why: (latent, mean code, loss, class) of those that the prediction rests on most, for or
            against, by descending size of the loss: what CLIP's logit of its predicted class,
            relative to the mean over all classes, loses when the latent's part is taken out of
            the stream; and the class that is predicted then.
    """

    index: int
    label: int
    tokens: list[tuple[list[int], list[float]]]
    latents: list[int]
    means: list[float]
    clip: list[tuple[int, float]]
    sae: list[tuple[int, float]]
    why: list[tuple[int, float, float, int]]


@dataclass(frozen=True)
class Effects:
    """What single latents do for the true class of images, E pairs of a latent and a class.

    Attributes:
        latent, label: int64 [E], ascending by latent, then by class.
        change: float32 [E], what CLIP's logit of the true class, relative to the mean over all
            classes, loses when the latent alone is taken out of the stream: the mean over the
            images of the class that were looked at and that the latent is active on. Above zero
            the latent helps the class, below it hurts it.
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


def logits_without(
    clip: FrozenCLIP,
    sae: nn.Module,
    tokens: Tensor,
    codes: Tensor,
    latents: Tensor,
    classifier: Tensor,
) -> Tensor:
    """CLIP's logits when one latent's part is taken out of the stream, for each of some latents.

    The rest of the stream, what the SAE does not reconstruct included, stays as it is.

    Args:
        tokens: one image's [T, d].
        codes: its codes [T, M].
        latents: LongTensor [n].

    Returns:
        [n, C].
    """
    scale = sae.input_scale(tokens)
    found = []
    for part in latents.split(_STREAMS):
        version, token = codes[:, part].T.nonzero(as_tuple=True)
        share = codes[token, part[version], None] * sae.decoder_rows(part)[version] * scale[token]
        changes = Changes(tokens, version, token, -share, len(part))
        found.append(clip.logits_of(clip.tail_of_changes(changes), classifier))
    return torch.cat(found)


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
        why: latents of an image that are switched off: those whose effect is largest to first
            order.
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
    needed = with_page | set(wanted)
    if on_image is not None:
        needed |= set(references.index[references.index >= 0].tolist())
    measured: list[tuple[Tensor, int, Tensor]] = []
    found = []
    with in_eval_mode([sae]):
        for pixels, labels, at in image_batches(dataset, batch_size, num_workers, sorted(needed)):
            if on_image is not None:
                for image, index in zip(pixels, at.tolist(), strict=True):
                    on_image(index, image)
            seen = [i for i, index in enumerate(at.tolist()) if index in with_page | wanted.keys()]
            if not seen:
                continue
            streams = clip.prefix(clip.normalize(pixels[seen]))
            logits = [None] * len(seen) if classifier is None else clip.logits(streams, classifier)
            for stream, own, index, label in zip(
                streams, logits, at[seen].tolist(), labels[seen].tolist(), strict=True
            ):
                codes = sae.encode(stream[None])[0]
                if index in with_page:
                    sizes = (per_token, per_image, why)
                    found.append(
                        _look(clip, sae, stream, codes, own, index, label, classifier, sizes)
                    )
                if effect_images:
                    latents = torch.tensor(wanted.get(index, []), device=codes.device)
                    if index in with_page:  # the wanted ones are among them
                        latents = (pool_codes(codes[None])[0] > 0).nonzero().squeeze(1)
                    without = logits_without(clip, sae, stream, codes, latents, classifier)
                    measured.append((latents, label, _centred(own - without)[:, label]))
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


def _centred(logits: Tensor) -> Tensor:
    return logits - logits.mean(dim=-1, keepdim=True)


def _look(
    clip: FrozenCLIP,
    sae: nn.Module,
    stream: Tensor,
    codes: Tensor,
    own: Tensor | None,
    index: int,
    label: int,
    classifier: Tensor | None,
    sizes: tuple[int, int, int],
) -> Look:
    per_token, per_image, why = sizes
    means = pool_codes(codes[None])[0]
    best = top_latents(means[None], min(per_image, len(means)))[0]
    best = best[means[best] > 0]
    of_token = top_latents(codes, min(per_token, codes.shape[1]))
    tokens = []
    for latents, values in zip(of_token, codes.gather(1, of_token), strict=True):
        kept = values > 0
        tokens.append((latents[kept].tolist(), values[kept].tolist()))
    said: list[tuple[int, float]] = []
    through, reasons = said, []
    if own is not None:
        said = likely(own)
        rebuilt = sae.decode(codes, sae.input_scale(stream))
        through = likely(clip.logits(rebuilt[None], classifier)[0])
        reasons = _why(clip, sae, stream, codes, own, classifier, why)
    return Look(
        index=index,
        label=label,
        tokens=tokens,
        latents=best.tolist(),
        means=means[best].tolist(),
        clip=said,
        sae=through,
        why=reasons,
    )


def _why(
    clip: FrozenCLIP,
    sae: nn.Module,
    stream: Tensor,
    codes: Tensor,
    own: Tensor,
    classifier: Tensor,
    n: int,
) -> list[tuple[int, float, float, int]]:
    predicted = own.argmax()
    estimate = first_order_effects(clip, sae, stream, codes, classifier, predicted).abs()
    chosen = top_latents(estimate[None], min(n, len(estimate)))[0]
    chosen = chosen[estimate[chosen] > 0]
    if not len(chosen):
        return []
    without = logits_without(clip, sae, stream, codes, chosen, classifier)
    lost = _centred(own - without)[:, predicted]
    order = lost.abs().sort(descending=True, stable=True).indices
    instead, means = without.argmax(dim=-1), codes[:, chosen].mean(dim=0)
    found = zip(chosen, means, lost, instead, strict=True)
    listed = [(int(m), float(mean), float(loss), int(other)) for m, mean, loss, other in found]
    return [listed[i] for i in order]


def first_order_effects(
    clip: FrozenCLIP,
    sae: nn.Module,
    stream: Tensor,
    codes: Tensor,
    classifier: Tensor,
    predicted: Tensor,
) -> Tensor:
    """What each latent adds to a class's logit, relative to the mean over all classes, to first
    order: gradient times contribution, [M]. One backward pass for all latents.

    Args:
        stream: [T, d].  codes: [T, M].
        predicted: the class.
    """
    with torch.enable_grad():
        tokens = stream.detach().requires_grad_(True)
        logits = clip.logits(tokens[None], classifier)[0]
        (gradient,) = torch.autograd.grad(_centred(logits)[predicted], tokens)
    along = (gradient * sae.input_scale(stream)).to(codes.dtype) @ sae.decoder_rows().T
    return (along * codes).sum(dim=0)


def likely(logits: Tensor) -> list[tuple[int, float]]:
    """The most likely classes and their probabilities, from logits [C]."""
    probability = logits.softmax(dim=-1)
    top = probability.topk(min(PREDICTIONS, len(logits)))
    return list(zip(top.indices.tolist(), top.values.tolist(), strict=True))

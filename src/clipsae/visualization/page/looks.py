"""Images through an SAE for the page: which latents fire where, what is predicted, and what
changes when a latent is switched off.

B images, T tokens of an image, d width, M latents, C classes, n latents.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
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
RIVALS = 100  # likeliest classes that the prediction can be compared with


@dataclass(frozen=True)
class Reasons:
    """What CLIP's prediction for an image rests on: its logits with and without single latents.

    Of n latents and the k classes that can be compared.

    Attributes:
        classes: the likeliest first, so that the first is what CLIP predicts and the second the
            runner-up; the true class is among them.
        logits: [k], CLIP's own.
        normaliser: log-sum-exp of CLIP's own logits of all C classes.
        latents: those that change the logit of the prediction, its margin over one of the
            `PREDICTIONS` likeliest other classes, or its probability most.
        means: [n], their mean codes.
        without: [n, k], the logits when the latent's part alone is taken out of the stream.
        normalisers: [n], of those.
        instead: [n], the class that is predicted then.
    """

    classes: list[int]
    logits: list[float]
    normaliser: float
    latents: list[int]
    means: list[float]
    without: list[list[float]]
    normalisers: list[float]
    instead: list[int]


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
    found = [classifier.new_zeros(0, len(classifier))]
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
        why: latents of an image that are kept for each question of `Reasons`. They are chosen
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
                        latents = _likely_reasons(clip, sae, stream, codes, classifier, own, why)
                    latents = latents.to(codes.device)
                    without = logits_without(clip, sae, stream, codes, latents, classifier)
                    rival = _strongest_other(own, label)
                    measured.append((latents, label, _margins(own, without, label, rival)))
                    if shown:
                        reasons = _reasons(own, codes, latents, without, label, why)
                if shown:
                    look = _look(clip, sae, stream, codes, own, classifier, per_token, per_image)
                    found.append(replace(look, index=index, label=label, why=reasons))
            done += len(seen)
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


def _strongest_other(own: Tensor, label: int) -> int:
    """The likeliest class but one, from logits [C]; that one where there is no other."""
    order = own.argsort(descending=True, stable=True)[:2].tolist()
    return next((k for k in order if k != label), label)


def _margins(own: Tensor, without: Tensor, of: int | Tensor, rival: int | Tensor) -> Tensor:
    """How much larger the margin of a class over another is with each latent than without, [n].

    Args:
        own: logits [C]; `without`: [n, C].
    """
    return (own[of] - own[rival]) - (without[:, of] - without[:, rival])


def _reasons(
    own: Tensor, codes: Tensor, latents: Tensor, without: Tensor, label: int, n: int
) -> Reasons:
    """The n latents with the largest effect by each measure, from the logits without any [n, C]."""
    order = own.argsort(descending=True, stable=True)
    predicted, others = order[0], order[1 : 1 + PREDICTIONS]
    effects = [own[predicted] - without[:, predicted]]
    effects += [_margins(own, without, predicted, rival) for rival in others]
    effects += [own.softmax(dim=-1)[predicted] - without.softmax(dim=-1)[:, predicted]]
    kept = _largest(torch.stack(effects), n)
    latents, without = latents[kept], without[kept]
    classes = order[:RIVALS]
    if label not in classes.tolist():
        classes = torch.cat((classes, classes.new_tensor([label])))
    return Reasons(
        classes=classes.tolist(),
        logits=own[classes].tolist(),
        normaliser=own.logsumexp(dim=-1).item(),
        latents=latents.tolist(),
        means=codes[:, latents].mean(dim=0).tolist(),
        without=without[:, classes].tolist(),
        normalisers=without.logsumexp(dim=-1).tolist(),
        instead=without.argmax(dim=-1).tolist(),
    )


def _largest(effects: Tensor, n: int) -> Tensor:
    """The places of the n largest of each row [measures, m], by size, without those that are 0;
    ascending."""
    best = top_latents(effects.abs(), min(n, effects.shape[1]))
    return best[effects.gather(1, best) != 0].unique()


def _likely_reasons(
    clip: FrozenCLIP,
    sae: nn.Module,
    stream: Tensor,
    codes: Tensor,
    classifier: Tensor,
    own: Tensor,
    n: int,
) -> Tensor:
    """The latents whose effect on the prediction is largest to first order, by its logit and by its
    margin over the runner-up."""
    order = own.argsort(descending=True, stable=True)[:2]
    effects = first_order_effects(clip, sae, stream, codes, classifier, order)
    effects = torch.cat((effects, effects[:1] - effects[-1:]))
    return _largest(effects, n)


def first_order_effects(
    clip: FrozenCLIP,
    sae: nn.Module,
    stream: Tensor,
    codes: Tensor,
    classifier: Tensor,
    classes: Tensor,
) -> Tensor:
    """What each latent adds to the logits of classes to first order: gradient times contribution,
    [classes, M]. One backward pass a class.

    Args:
        stream: [T, d].  codes: [T, M].
    """
    scale, rows, found = sae.input_scale(stream), sae.decoder_rows(), []
    with torch.enable_grad():
        tokens = stream.detach().requires_grad_(True)
        logits = clip.logits(tokens[None], classifier)[0]
        for k in classes.tolist():
            (gradient,) = torch.autograd.grad(logits[k], tokens, retain_graph=True)
            found.append((((gradient * scale).to(codes.dtype) @ rows.T) * codes).sum(dim=0))
    return torch.stack(found)


def likely(logits: Tensor) -> list[tuple[int, float]]:
    """The most likely classes and their probabilities, from logits [C]."""
    probability = logits.softmax(dim=-1)
    top = probability.topk(min(PREDICTIONS, len(logits)))
    return list(zip(top.indices.tolist(), top.values.tolist(), strict=True))

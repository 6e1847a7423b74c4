"""CLIP's output when latents are taken out of an image's token stream, or set.

T tokens of an image, d width, M latents, C classes, V versions of an image, n latents that are
taken out, k classes that are kept.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from clipsae.clip import FrozenCLIP
from clipsae.clip.changes import Changes
from clipsae.data.loader import image_batches
from clipsae.evaluation.passes import covered, in_eval_mode, whole_codes
from clipsae.evaluation.ranking import top_latents
from clipsae.sae import SAE

PREDICTIONS = 5  # that are shown
_STREAMS = 64  # token streams that go through the tail together
_RIVALS = 100  # likeliest classes that the prediction can be compared with


@dataclass(frozen=True)
class Reasons:
    """CLIP's logits for an image with and without single latents: n latents, k classes.

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
class Versions:
    """Versions of an image, each with the codes of some latents set: n pairs of a version and a
    latent in all.

    Attributes:
        version: LongTensor [n], ascending, 0..V - 1.
        latent: LongTensor [n]; a latent occurs once in a version.
        level: [n], the code that it is set to on every token; 0 takes it out.
        rows: [n, d], the directions that the codes stand for: decoder rows, or others.
        count: V.
    """

    version: Tensor
    latent: Tensor
    level: Tensor
    rows: Tensor
    count: int

    @classmethod
    def of(
        cls,
        sae: SAE,
        sets: Sequence[Sequence[int]],
        levels: Sequence[Sequence[float]] | None = None,
    ) -> "Versions":
        """One version for each set of latents, on the device of the SAE.

        Args:
            levels: the code of each latent of each set; None: all are taken out.

        Raises:
            ValueError: a latent that does not exist, or one that is twice in a set.
        """
        for one in sets:
            for m in one:
                if not 0 <= m < sae.latents:
                    raise ValueError(f"latent {m}: expected 0 to {sae.latents - 1}")
            if len(set(one)) < len(one):
                raise ValueError(f"latents {list(one)}: expected each of them once")
        device = sae.tokens_since_fired.device
        sizes = torch.tensor([len(one) for one in sets], dtype=torch.long, device=device)
        latent = torch.tensor([m for one in sets for m in one], dtype=torch.long, device=device)
        codes = [0.0] * len(latent) if levels is None else [v for one in levels for v in one]
        rows = sae.decoder_rows(latent)
        level = torch.tensor(codes, dtype=rows.dtype, device=device)
        version = torch.arange(len(sets), device=device).repeat_interleave(sizes)
        return cls(version, latent, level, rows, len(sets))

    def chosen(self, versions: Tensor) -> "Versions":
        """Those versions alone, LongTensor, ascending, renumbered from 0."""
        place = versions.new_full((self.count,), -1)
        place[versions] = torch.arange(len(versions), device=versions.device)
        of = place[self.version]
        kept = of >= 0
        version, latent, level, rows = (x[kept] for x in (of, self.latent, self.level, self.rows))
        return Versions(version, latent, level, rows, len(versions))

    def changing(self, codes: Tensor) -> Tensor:
        """The versions in which an image's codes [T, M] are others, LongTensor, ascending."""
        return self.version[(self.level[:, None] != codes[:, self.latent].T).any(dim=1)].unique()


def embeddings_of(
    clip: FrozenCLIP,
    sae: SAE,
    stream: Tensor,
    codes: Tensor,
    versions: Versions,
    context: Tensor | None = None,
) -> Tensor:
    """An image's embeddings [V, e] in each version, not normalised.

    Tokens that the SAE has no codes for stay as they are. The tail is computed for many versions
    together.

    Args:
        sae: in eval mode, on the device of `clip`.
        stream: the image's tokens as they are, [T, d].
        codes: of them, [T, M].
        context: [T, d] or None, as of `FrozenCLIP.tail`.
    """
    there, scale = covered(clip, sae, stream[None]), sae.input_scale(stream)[..., :1]
    found = [stream.new_zeros(0, clip.embed_dim)]
    for part in torch.arange(versions.count, device=stream.device).split(_STREAMS):
        some = versions.chosen(part)
        change = some.level[:, None] - codes[:, some.latent].T  # [n, T]
        if there is not None:
            change = change * there[0]
        pair, token = change.nonzero(as_tuple=True)
        added = change[pair, token, None] * some.rows[pair] * scale[token]
        # A token that several latents of a version change is one change.
        where = some.version[pair] * len(stream) + token
        where, place = where.unique(return_inverse=True)
        added = added.new_zeros(len(where), added.shape[1]).index_add_(0, place, added)
        version = torch.div(where, len(stream), rounding_mode="floor")
        changes = Changes(stream, version, where % len(stream), added, some.count)
        found.append(clip.tail_of_changes(changes, context))
    return torch.cat(found)


@dataclass(frozen=True)
class Changed:
    """An image in the versions that change its codes.

    Attributes:
        index: in the dataset.
        before: its embedding as it is, [e], not normalised.
        versions: LongTensor [n], ascending.
        after: its embedding in each of them, [n, e].
    """

    index: int
    before: Tensor
    versions: Tensor
    after: Tensor


@torch.no_grad()
def changed_images(
    clip: FrozenCLIP,
    sae: SAE,
    dataset: Any,
    versions: Versions,
    indices: Sequence[int],
    *,
    batch_size: int = 32,
    num_workers: int = 0,
) -> Iterator[Changed]:
    """Images of a dataset in the versions that change them: their tokens and codes are computed
    once.

    Args:
        sae: of `clip`'s layer, on its device.
        indices: the images, in this order; those that cannot be read are left out where the dataset
            skips them.

    Raises:
        ValueError: a transcoder, whose codes are no part of the tokens that it reads.
    """
    if sae.config["target_layer"] is not None:
        raise ValueError("a transcoder has no part in the tokens that it reads: use another SAE")
    with in_eval_mode([sae]):
        for pixels, _, at in image_batches(dataset, batch_size, num_workers, indices):
            streams, contexts = clip.prefix(clip.normalize(pixels), with_context=True)
            before = clip.tail(streams, contexts)
            for i, index in enumerate(at.tolist()):
                codes = whole_codes(clip, sae, streams[i : i + 1])[0]
                active, context = versions.changing(codes), None
                if contexts is not None:
                    context = contexts[i]
                some = versions.chosen(active)
                after = embeddings_of(clip, sae, streams[i], codes, some, context)
                yield Changed(index, before[i], active, after)


@dataclass(frozen=True)
class Interventions:
    """Changes of an image's tokens [T, d] by latents, and CLIP's logits after them. All else in the
    tokens stays as it is, what the SAE does not reconstruct included. `context` is [T, d] or None,
    as of `FrozenCLIP.tail`.

    Attributes:
        sae: in eval mode, on the device of `clip`.
        classifier: text embeddings [C, e], on that device.
    """

    clip: FrozenCLIP
    sae: SAE
    classifier: Tensor

    def logits_of(
        self, stream: Tensor, codes: Tensor, versions: Versions, context: Tensor | None = None
    ) -> Tensor:
        """The logits [V, C] in each version; other arguments as of `embeddings_of`."""
        embeddings = embeddings_of(self.clip, self.sae, stream, codes, versions, context)
        return self.clip.logits_of(embeddings, self.classifier)

    def logits_without(
        self, stream: Tensor, codes: Tensor, latents: Tensor, context: Tensor | None = None
    ) -> Tensor:
        """The logits [n, C] without each latent of `latents` [n] alone; codes [T, M]."""
        versions = Versions.of(self.sae, [[m] for m in latents.tolist()])
        return self.logits_of(stream, codes, versions, context)

    @torch.no_grad()
    def steered_logits(self, image: Tensor, strengths: Mapping[int, float]) -> Tensor:
        """The logits [C] of an image, uint8 [3, S, S], when codes are set on every token.

        Args:
            strengths: latent -> its code; 0 switches it off.

        Raises:
            ValueError: a latent that does not exist.
        """
        versions = Versions.of(self.sae, [[*strengths]], [[*strengths.values()]])
        streams, context = self.clip.prefix(self.clip.normalize(image[None]), with_context=True)
        codes = whole_codes(self.clip, self.sae, streams)[0]
        beside = None if context is None else context[0]
        return self.logits_of(streams[0], codes, versions, beside)[0]

    def first_order_effects(
        self, stream: Tensor, codes: Tensor, classes: Tensor, context: Tensor | None = None
    ) -> Tensor:
        """What each latent adds to the logits of classes to first order: gradient times
        contribution, [classes, M]. One backward pass a class."""
        scale = self.sae.input_scale(stream)[..., :1]
        rows, found = self.sae.decoder_rows(), []
        with torch.enable_grad():
            tokens = stream.detach().requires_grad_(True)
            beside = None if context is None else context[None]
            logits = self.clip.logits(tokens[None], self.classifier, beside)[0]
            for k in classes.tolist():
                (gradient,) = torch.autograd.grad(logits[k], tokens, retain_graph=True)
                found.append((((gradient * scale).to(codes.dtype) @ rows.T) * codes).sum(dim=0))
        return torch.stack(found)

    def likely_reasons(
        self, stream: Tensor, codes: Tensor, logits: Tensor, n: int, context: Tensor | None = None
    ) -> Tensor:
        """The latents with the largest effect to first order on the prediction's logit, and on its
        margin over the runner-up; ascending."""
        order = logits.argsort(descending=True, stable=True)[:2]
        effects = self.first_order_effects(stream, codes, order, context)
        return _largest(torch.cat((effects, effects[:1] - effects[-1:])), n)


def reasons_of(
    logits: Tensor, codes: Tensor, latents: Tensor, without: Tensor, label: int, n: int
) -> Reasons:
    """The n latents with the largest effect by each measure.

    Args:
        logits: CLIP's own [C].
        codes: [T, M].
        without: the logits without each of `latents`.
        label: the true class.
    """
    order = logits.argsort(descending=True, stable=True)
    predicted, others = order[0], order[1 : 1 + PREDICTIONS]
    effects = [logits[predicted] - without[:, predicted]]
    effects += [margins(logits, without, predicted, rival) for rival in others]
    effects += [logits.softmax(dim=-1)[predicted] - without.softmax(dim=-1)[:, predicted]]
    kept = _largest(torch.stack(effects), n)
    latents, without = latents[kept], without[kept]
    classes = order[:_RIVALS]
    if label not in classes.tolist():
        classes = torch.cat((classes, classes.new_tensor([label])))
    return Reasons(
        classes=classes.tolist(),
        logits=logits[classes].tolist(),
        normaliser=logits.logsumexp(dim=-1).item(),
        latents=latents.tolist(),
        means=codes[:, latents].mean(dim=0).tolist(),
        without=without[:, classes].tolist(),
        normalisers=without.logsumexp(dim=-1).tolist(),
        instead=without.argmax(dim=-1).tolist(),
    )


def margins(logits: Tensor, without: Tensor, label: int | Tensor, rival: int | Tensor) -> Tensor:
    """How much larger the margin of a class over a rival is with each latent than without, [n]."""
    return (logits[label] - logits[rival]) - (without[:, label] - without[:, rival])


def strongest_other(logits: Tensor, label: int) -> int:
    """The likeliest class other than one, from logits [C]; that one where it is the only one."""
    order = logits.argsort(descending=True, stable=True)[:2].tolist()
    return next((k for k in order if k != label), label)


def likely(logits: Tensor) -> list[tuple[int, float]]:
    """The most likely classes and their probabilities, from logits [C]."""
    probability = logits.softmax(dim=-1)
    top = probability.topk(min(PREDICTIONS, len(logits)))
    return list(zip(top.indices.tolist(), top.values.tolist(), strict=True))


def _largest(effects: Tensor, n: int) -> Tensor:
    """The places of the n largest of each row [measures, m], by size, without those that are 0;
    ascending."""
    best = top_latents(effects.abs(), min(n, effects.shape[1]))
    return best[effects.gather(1, best) != 0].unique()

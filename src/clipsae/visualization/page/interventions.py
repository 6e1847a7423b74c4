"""CLIP's logits when latents are taken out of an image's token stream, or set.

T tokens of an image, d width, M latents, C classes, n latents that are taken out, k classes that
are kept.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from clipsae.clip import FrozenCLIP
from clipsae.clip.changes import Changes
from clipsae.evaluation.passes import covered, whole_codes
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

    def logits_without(
        self, stream: Tensor, codes: Tensor, latents: Tensor, context: Tensor | None = None
    ) -> Tensor:
        """The logits [n, C] without each latent of `latents` [n] alone; codes [T, M]."""
        sae, scale = self.sae, self.sae.input_scale(stream)[..., :1]
        found = [self.classifier.new_zeros(0, len(self.classifier))]
        for part in latents.split(_STREAMS):
            version, token = codes[:, part].T.nonzero(as_tuple=True)
            rows = sae.decoder_rows(part)[version]
            share = codes[token, part[version], None] * rows * scale[token]
            changes = Changes(stream, version, token, -share, len(part))
            embeddings = self.clip.tail_of_changes(changes, context)
            found.append(self.clip.logits_of(embeddings, self.classifier))
        return torch.cat(found)

    @torch.no_grad()
    def steered_logits(self, image: Tensor, strengths: Mapping[int, float]) -> Tensor:
        """The logits [C] of an image, uint8 [3, S, S], when codes are set on every token.

        Args:
            strengths: latent -> its code; 0 switches it off.

        Raises:
            ValueError: a latent that does not exist.
        """
        latents = self.sae.config["latents"]
        wrong = [m for m in strengths if not 0 <= m < latents]
        if wrong:
            raise ValueError(f"latent {wrong[0]}: expected 0 to {latents - 1}")
        streams, context = self.clip.prefix(self.clip.normalize(image[None]), with_context=True)
        stream = streams[0]
        if strengths:
            chosen = torch.tensor(list(strengths), device=stream.device)
            new = torch.tensor(list(strengths.values()), dtype=stream.dtype, device=stream.device)
            change = new - whole_codes(self.clip, self.sae, streams)[0][:, chosen]
            there = covered(self.clip, self.sae, stream[None])
            if there is not None:
                change = change * there[0, :, None]
            rows = self.sae.decoder_rows(chosen)
            stream = stream + (change @ rows) * self.sae.input_scale(stream)[..., :1]
        return self.clip.logits(stream[None], self.classifier, context)[0]

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

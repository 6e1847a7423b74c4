"""What a prediction rests on: CLIP's logits when single latents are taken out of the stream.

T tokens of an image, d width, M latents, C classes, n latents that are taken out, k classes that
are kept.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from clipsae.clip import FrozenCLIP
from clipsae.clip.changes import Changes
from clipsae.evaluation.ranking import top_latents

_STREAMS = 64  # token streams that go through the tail together
PREDICTIONS = 5  # that are shown
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


def reasons_of(
    own: Tensor, codes: Tensor, latents: Tensor, without: Tensor, label: int, n: int
) -> Reasons:
    """The n latents with the largest effect by each measure, from the logits without any [n, C]."""
    order = own.argsort(descending=True, stable=True)
    predicted, others = order[0], order[1 : 1 + PREDICTIONS]
    effects = [own[predicted] - without[:, predicted]]
    effects += [margins(own, without, predicted, rival) for rival in others]
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


def likely_reasons(
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


def strongest_other(own: Tensor, label: int) -> int:
    """The likeliest class other than one, from logits [C]; that one where it is the only one."""
    order = own.argsort(descending=True, stable=True)[:2].tolist()
    return next((k for k in order if k != label), label)


def margins(own: Tensor, without: Tensor, of: int | Tensor, rival: int | Tensor) -> Tensor:
    """How much larger the margin of a class over another is with each latent than without, [n].

    Args:
        own: logits [C]; `without`: [n, C].
    """
    return (own[of] - own[rival]) - (without[:, of] - without[:, rival])


def _largest(effects: Tensor, n: int) -> Tensor:
    """The places of the n largest of each row [measures, m], by size, without those that are 0;
    ascending."""
    best = top_latents(effects.abs(), min(n, effects.shape[1]))
    return best[effects.gather(1, best) != 0].unique()

"""How far latents steer CLIP's zero-shot predictions, and what else they move.

An intervention sets the codes of one latent, or of several, on every token of an image; the blocks
of CLIP behind the SAE's layer are computed again. With l the logits of the C classes as they are
and l_v those after it, the effect on image i is what the latents give:

    e_i = l - l_v where the codes are taken out (set to 0), l_v - l where they are set to more,

less its mean over the classes, which changes no prediction. Of the images on which an intervention
changes anything, every second chooses its target, argmax_c mean_i e_ic; on the others are measured

    steerability = mean_i e_i,target          (in logits, that is nats)
    specificity  = m_target^2 / sum_c m_c^2,  m = mean_i e_i,

so that a target which is the largest of many by chance counts for nothing. Were the logit of the
target the only one to move, specificity would be 1 - 1/C. The floor of both is that of random
directions: the same codes on the same tokens, times vectors as long as the decoder rows.

Joseph et al., "Steering CLIP's vision transformer with sparse autoencoders" (2025, arXiv
2504.08729), measure steerability over a vocabulary of texts in CLIP's output; here it is over the
classifier's rows, whatever their texts are.

T tokens of an image, C classes, V interventions, M latents.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from clipsae.clip import FrozenCLIP
from clipsae.evaluation.interventions import Versions, changed_images
from clipsae.evaluation.passes import evenly_spaced
from clipsae.sae import SAE

PERCENTILE = 0.95  # of the random directions' steerability, above which a latent steers
STATE = "steering.safetensors"  # of an unfinished pass
_NORMAL = 1.96  # of a 95 % interval


@dataclass(frozen=True)
class Steering:
    """Numbers of V interventions, on the CPU.

    Attributes:
        images: LongTensor [V], the images on which it changed a token; a removal changes those
            alone on which the latent is active.
        target: LongTensor [V], the class that it gives most to; -1 for fewer than two images.
        steerability: float32 [V], in logits, on images that did not choose the target; NaN for
            fewer than two images.
        low, high: float32 [V], its 95 % interval over images; NaN for fewer than four.
        specificity: float32 [V], 0..1; NaN where steerability is.
        flipped: float32 [V], the share of the images whose predicted class is another one then.
        effect: float32 [V, C], the mean effect on each class, on the images that measure.
    """

    images: Tensor
    target: Tensor
    steerability: Tensor
    low: Tensor
    high: Tensor
    specificity: Tensor
    flipped: Tensor
    effect: Tensor

    def chosen(self, rows: Tensor) -> "Steering":
        """Those of some interventions, a mask or LongTensor."""
        return Steering(*(value[rows] for value in vars(self).values()))

    def others(self, v: int, n: int = 3) -> list[tuple[int, float]]:
        """What else an intervention moves most: classes beside its target, and the effects."""
        order = self.effect[v].abs().argsort(descending=True, stable=True).tolist()
        found = [k for k in order if k != int(self.target[v])][:n]
        return [(k, float(self.effect[v, k])) for k in found]


@torch.no_grad()
def measure_steering(
    clip: FrozenCLIP,
    sae: SAE,
    dataset: Any,
    classifier: Tensor,
    sets: Sequence[Sequence[int]],
    levels: Sequence[Sequence[float]] | None = None,
    *,
    random: int = 0,
    seed: int = 0,
    images: int | None = None,
    batch_size: int = 32,
    num_workers: int = 0,
    scratch: Path | None = None,
    save_every_seconds: float = 300,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[Steering, Steering]:
    """What interventions do to the zero-shot predictions, in one pass over images.

    An image's prefix and codes are computed once, and the tail of all interventions that change it
    together (`FrozenCLIP.tail_of_changes`). Memory: 24 V C bytes.

    Args:
        sae: of `clip`'s layer; moved to its device.
        dataset: `labels` LongTensor [N], items (uint8 [3, S, S], label).
        classifier: text embeddings [C, e] of at least two classes.
        sets: V sets of latents.
        levels: the codes that they are set to on every token; None: all are taken out.
        random: so many of the interventions, evenly spaced, are measured with random directions in
            place of the decoder rows, too.
        seed: of these.
        images: so many of the dataset, evenly spaced over the classes; None: all.
        scratch: a folder for the state of an unfinished pass: a later call with the same arguments
            goes on from the last save, every `save_every_seconds`.
        progress: called with (images done, images in all).

    Returns:
        The V interventions, and those with random directions.

    Raises:
        ValueError: no set, one class, a latent that does not exist or is twice in a set; a
            transcoder.
    """
    if not sets:
        raise ValueError("no latents to steer by: expected at least one set of them")
    if len(classifier) < 2:
        raise ValueError("one class: a prediction can be steered between two or more")
    sae.to(clip.device)
    classifier = classifier.to(clip.device)
    versions = Versions.of(sae, sets, levels)
    some = torch.linspace(0, len(sets) - 1, min(random, len(sets))).round().long()
    versions = with_random(versions, some.to(clip.device), seed)
    removed = torch.ones(versions.count, dtype=torch.bool, device=clip.device)
    removed[versions.version[versions.level != 0]] = False
    sums = Sums(removed, len(classifier))
    indices = evenly_spaced(dataset.labels, images)
    position = {index: i for i, index in enumerate(indices)}
    done = 0 if scratch is None else sums.resume(scratch)
    saved, reading = time.monotonic(), {"batch_size": batch_size, "num_workers": num_workers}
    for one in changed_images(clip, sae, dataset, versions, indices[done:], **reading):
        before, after = (clip.logits_of(x, classifier) for x in (one.before, one.after))
        sums.add(one.versions, before, after)
        sums.done = position[one.index] + 1
        progress(sums.done, len(indices))
        # At the end of a batch: the same images are then in the batches that follow.
        whole, late = sums.done % batch_size == 0, time.monotonic() - saved >= save_every_seconds
        if scratch is not None and whole and late:
            sums.save(scratch)
            saved = time.monotonic()
    found = sums.compute()
    own = torch.arange(versions.count) < len(sets)
    return found.chosen(own), found.chosen(~own)


def with_random(versions: Versions, some: Tensor, seed: int) -> Versions:
    """Versions and, behind them, those of `some`, LongTensor, again with random directions that are
    as long as their rows."""
    again = versions.chosen(some)
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(again.rows.shape, generator=generator).to(again.rows)
    rows = rows / rows.norm(dim=1, keepdim=True) * again.rows.norm(dim=1, keepdim=True)
    return Versions(
        torch.cat((versions.version, versions.count + again.version)),
        torch.cat((versions.latent, again.latent)),
        torch.cat((versions.level, again.level)),
        torch.cat((versions.rows, rows)),
        versions.count + again.count,
    )


class Sums:
    """Effects of V interventions, summed over images.

    Args:
        removed: BoolTensor [V], those that take codes out.
        classes: C.
    """

    def __init__(self, removed: Tensor, classes: int) -> None:
        self.sign = torch.where(removed, -1.0, 1.0)
        self.images = torch.zeros(len(removed), dtype=torch.long, device=removed.device)
        self.flips = torch.zeros_like(self.images)
        nothing = torch.zeros(len(removed), classes, dtype=torch.float64, device=removed.device)
        self.choosing, self.measured, self.squares = nothing, nothing.clone(), nothing.clone()
        self.done = 0

    def add(self, active: Tensor, before: Tensor, after: Tensor) -> None:
        """An image.

        Args:
            active: LongTensor [n], the interventions that change it.
            before: CLIP's logits [C].
            after: those of each, [n, C].
        """
        effect = (after - before).double() * self.sign[active, None]
        effect = effect - effect.mean(dim=1, keepdim=True)
        chooses = self.images[active] % 2 == 0
        self.choosing[active[chooses]] += effect[chooses]
        self.measured[active[~chooses]] += effect[~chooses]
        self.squares[active[~chooses]] += effect[~chooses].square()
        self.flips[active] += (after.argmax(dim=1) != before.argmax()).long()
        self.images[active] += 1

    def compute(self) -> Steering:
        n = (self.images // 2).double()  # that measure
        mean = self.measured / n[:, None]
        target = self.choosing.argmax(dim=1, keepdim=True)
        variance = self.squares / n[:, None] - mean.square()
        variance = variance * (n / (n - 1))[:, None]
        steerability = mean.gather(1, target)[:, 0]
        error = _NORMAL * (variance.gather(1, target)[:, 0].clamp(min=0) / n).sqrt()
        error = torch.where(n > 1, error, torch.nan)
        found = {
            "images": self.images,
            "target": torch.where(n > 0, target[:, 0], -1),
            "steerability": steerability.float(),
            "low": (steerability - error).float(),
            "high": (steerability + error).float(),
            "specificity": (steerability.square() / mean.square().sum(dim=1)).float(),
            "flipped": (self.flips / self.images).float(),
            "effect": mean.float(),
        }
        return Steering(**{name: value.cpu() for name, value in found.items()})

    def _state(self) -> dict[str, Tensor]:
        return {name: x for name, x in vars(self).items() if isinstance(x, Tensor)}

    def save(self, folder: Path) -> None:
        """Write the state, and how many images it is of."""
        aside = folder / f".{STATE}"
        state = {name: x.cpu().contiguous() for name, x in self._state().items()}
        save_file({**state, "done": torch.tensor(self.done)}, aside)
        aside.replace(folder / STATE)

    def resume(self, folder: Path) -> int:
        """Read what `save` wrote, if it is there; how many images it is of."""
        if not (folder / STATE).is_file():
            return 0
        found = load_file(folder / STATE)
        self.done = int(found.pop("done"))
        for name, x in self._state().items():
            x.copy_(found[name])
        return self.done


def threshold(random: Steering) -> float:
    """The steerability that one in twenty random directions exceeds; NaN without any."""
    known = random.steerability[random.steerability.isfinite()]
    return float(known.double().quantile(PERCENTILE)) if len(known) else torch.nan

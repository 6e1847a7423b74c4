"""Top-n concept classification: how much of CLIP's zero-shot accuracy few latents carry.

Protocol: PatchSAE (Lim et al., ICLR 2025), as the tables of "no_sae, on_n, off_n" have it. Every
token of the residual stream is replaced by the SAE's reconstruction from some of its latents, the
rest of CLIP runs on it, and the image embedding is compared with the class names' embeddings.

    no_sae   the stream as it is
    on_n     the n latents that are active most often on images of the image's *true* class
    off_n    all latents but those;  n = M: everything (on), nothing (off)
    self_n   the n latents with the largest activation summed over the image's own tokens: no label

The images are visited class by class, so that a class's counts are final as soon as its images
have passed: until then its reconstructions and sparse codes wait in memory, and prefix, encoder
and decoder run once per image. The few latents' codes are looked up (found again by a product
with their rows, one that lies at the threshold could change sides); off_n is the whole less on_n,
as decoding is linear. All that runs per setting is the tail, a sixth of a block at layer -2.

B images, T tokens of an image, d width, M latents, C classes, N images of the split, n latents
kept.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from clipsae.evaluation.numbers import SETTINGS
from clipsae.evaluation.passes import Batch, Stream, predict
from clipsae.evaluation.ranking import ClassRankings, top_latents
from clipsae.sae import SAE, SparseCodes

PROTOCOLS = ("paper", "heldout")

# (sae, setting, n), such as ("topk", "on", 5).
Key = tuple[str | None, str, int | None]
NO_SAE: Key = (None, "no_sae", None)


def check_topn_options(ns: Sequence[int], protocol: str, settings: Sequence[str]) -> None:
    """Refuse what a top-n evaluation would, without anything else at hand.

    Raises:
        ValueError: no or wrong numbers of latents, an unknown protocol or setting.
    """
    if not ns or any(n < 1 for n in ns):
        raise ValueError(f"ns={list(ns)}: expected numbers of latents, each at least 1")
    if protocol not in PROTOCOLS:
        raise ValueError(f"protocol={protocol!r}: expected one of {', '.join(PROTOCOLS)}")
    unknown = [setting for setting in settings if setting not in SETTINGS]
    if unknown or not settings:
        raise ValueError(f"settings={list(settings)}: expected some of {', '.join(SETTINGS)}")


class Predictions:
    """The predicted class of each of N images in every setting; -1 where there is none."""

    def __init__(self, images: int) -> None:
        self.images = images
        self.by_key: dict[Key, Tensor] = {}

    def add(self, key: Key, predicted: Tensor, indices: Tensor) -> None:
        """Of the images `indices`, LongTensor [B]."""
        if key not in self.by_key:
            self.by_key[key] = torch.full((self.images,), -1)
        self.by_key[key][indices] = predicted.cpu()


@dataclass(frozen=True)
class _Waiting:
    """An image whose settings are yet to be run."""

    label: int
    index: int
    reconstruction: Tensor
    scale: Tensor
    own: Tensor | None
    codes: SparseCodes | None

    @property
    def nbytes(self) -> int:
        parts = (self.reconstruction, self.scale, self.own, self.codes)
        return sum(part.nbytes for part in parts if part is not None)


class TopN:
    """The settings of one SAE.

    Args:
        ns: numbers of latents; those below M are ranked, M is the whole dictionary.
        settings: those of `on`, `off`, `self` that are wanted.
        count_threshold: a (token, latent) pair counts if its code is larger.
        counting: the evaluated images are what is counted, too. Otherwise `count` comes first.
        memory: bytes that images which wait for their class may take. The images of a class that
            needs more are listed in `postponed`, to be given to `update` again, after `close`.
    """

    def __init__(
        self,
        name: str,
        sae: SAE,
        stream: Stream,
        predictions: Predictions,
        *,
        ns: Sequence[int],
        settings: Sequence[str],
        count_threshold: float,
        counting: bool,
        memory: float,
    ) -> None:
        assert stream.classifier is not None
        self.name = name
        self.sae = sae
        self.stream = stream
        self.predictions = predictions
        self.settings = settings
        self.count_threshold = count_threshold
        self.counting = counting
        self.memory = memory
        device = stream.classifier.device
        self.latents: int = sae.config["latents"]
        self.ns = sorted({n for n in ns if n < self.latents})
        self.most = max(self.ns, default=0)
        self.ranks = bool(self.ns) and bool({"on", "off"} & set(settings))
        self.rankings = ClassRankings(len(stream.classifier), self.latents, self.most, device)
        self.postponed: set[int] = set()
        self._too_large: int | None = None
        self._waiting: list[_Waiting] = []
        self._above, self._active = torch.zeros(2, dtype=torch.long, device=device).unbind()

    @property
    def keys(self) -> list[Key]:
        """All settings in the order of the result's rows."""
        ns = {"on": [*self.ns, self.latents], "off": [*self.ns, self.latents], "self": self.ns}
        return [(self.name, s, n) for s in ns if s in self.settings for n in ns[s]]

    @property
    def share_above_threshold(self) -> float:
        """Of the active pairs that were counted; 0 of none."""
        return (self._above / self._active.clamp(min=1)).item()

    def count(self, batch: Batch) -> None:
        """Count the latents of images, given in the order of their classes."""
        counts = batch.counts(self.count_threshold)
        self._above += counts.sum()
        self._active += len(batch.sparse.values)
        self.rankings.add(batch.labels.tolist(), counts, batch.sums)

    def update(self, batch: Batch) -> None:
        """Run the settings on images, given in the order of their classes, or have them wait."""
        if self.counting:
            self.count(batch)
        own: list[Tensor | None] = [None] * len(batch.labels)
        codes: list[SparseCodes | None] = [None] * len(batch.labels)
        if self.ns and {"on", "off", "self"} & set(self.settings):
            codes = [*batch.image_codes()]
            if "self" in self.settings:
                own = list(top_latents(batch.sums, self.most))
        places = zip(batch.labels.tolist(), batch.indices.tolist(), own, codes, strict=True)
        for i, (label, index, best, of) in enumerate(places):
            if label == self._too_large:
                self.postponed.add(index)
            else:
                # Copies of the rows: views would hold the whole batch.
                streams = batch.reconstruction[i].clone(), batch.scale[i].clone()
                self._waiting.append(_Waiting(label, index, *streams, best, of))
        self._run(at_least=self.stream.batch_size)
        if self._bytes() > self.memory:
            self._run(at_least=1)
        if self._bytes() > self.memory:
            self.postponed |= {image.index for image in self._waiting}
            self._too_large = self.rankings.open
            self._waiting = []

    def close(self) -> None:
        """The last class is complete: all that waits is run, and nothing is counted any more."""
        self.rankings.close()
        self._run(at_least=1)
        self.counting, self._too_large = False, None

    def _bytes(self) -> int:
        return sum(image.nbytes for image in self._waiting)

    def _run(self, at_least: int) -> None:
        """Run the images whose class is complete, in batches across classes."""
        size = self.stream.batch_size
        waits = self.rankings.open if self.ranks else None
        ready = sum(image.label != waits for image in self._waiting)
        while ready >= at_least:
            take = min(ready, size)
            batch, self._waiting = self._waiting[:take], self._waiting[take:]
            ready -= take
            self._predict(batch)

    def _predict(self, batch: list[_Waiting]) -> None:
        indices = torch.tensor([image.index for image in batch])
        whole = torch.stack([image.reconstruction for image in batch])
        scale = torch.stack([image.scale for image in batch])
        bias = self.sae.decoder_bias
        nothing = torch.zeros_like(scale) if bias is None else bias * scale

        def add(setting: str, n: int, tokens: Tensor) -> None:
            if setting in self.settings:
                predicted = predict(self.stream, tokens)
                self.predictions.add((self.name, setting, n), predicted, indices)

        add("on", self.latents, whole)
        add("off", self.latents, nothing.expand_as(whole))
        chosen = []
        if self.ranks:
            of_classes = self.rankings.latents[[image.label for image in batch]]
            chosen.append((of_classes, "on", "off"))
        if self.ns and "self" in self.settings:
            own = [image.own for image in batch if image.own is not None]
            chosen.append((torch.stack(own), "self", ""))
        for latents, on, off in chosen:
            # The first n latents, and their codes [B, T, n], serve n.
            images = [image.codes for image in batch if image.codes is not None]
            codes = torch.stack([of.lookup(n) for of, n in zip(images, latents, strict=True)])
            for n in self.ns:
                few = self.sae.decode(codes[..., :n].contiguous(), scale, latents[:, :n])
                add(on, n, few)
                if off in self.settings:
                    add(off, n, whole - few + nothing)  # the bias is in both


def per_class_accuracy(predictions: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Share of right predictions of each class in percent, float64 [C]; NaN without images.

    Args:
        predictions, labels: LongTensor [N]; images with prediction -1 are left out.
    """
    seen = predictions >= 0
    images = torch.bincount(labels[seen], minlength=classes)
    right = torch.bincount(labels[seen & (predictions == labels)], minlength=classes)
    return 100 * right.double() / images  # 0/0 is NaN


def make_rows(
    predictions: dict[Key, Tensor],
    by_class: dict[Key, Tensor],
    labels: Tensor,
    saes: Sequence[str],
    protocol: str,
) -> list[dict[str, Any]]:
    """The tidy rows: for each SAE `no_sae` and then its own settings, in the given order."""
    rows = []
    names: Sequence[str | None] = saes or [None]
    for name in names:
        for key in [key for key in predictions if key[0] in (None, name)]:
            predicted = predictions[key]
            seen = predicted >= 0
            rows.append(
                {
                    "sae": name,
                    "protocol": protocol,
                    "setting": key[1],
                    "n": key[2],
                    # Over the classes that have images: torchmetrics' macro average would count
                    # one that is predicted but absent as 0.
                    "accuracy": by_class[key].nanmean().item(),
                    "micro_accuracy": 100 * (predicted == labels)[seen].double().mean().item(),
                    "images": int(seen.sum()),
                    "classes": int((~by_class[key].isnan()).sum()),
                    "competing": len(by_class[key]),
                }
            )
    return rows

"""Top-n concept classification: how much of CLIP's zero-shot accuracy few latents carry.

Protocol: PatchSAE (Lim et al., ICLR 2025), as the tables of "no_sae, on_n, off_n" have it. Every
token of the residual stream (or what the SAE reads instead: `FrozenCLIP.load`'s `hook`) is replaced
by the SAE's reconstruction from some of its latents, the rest of CLIP runs on it, and the image
embedding is compared with the class names' embeddings.

    no_sae   the stream as it is
    on_n     the n latents that stand for the image's *true* class, by one of two `RANKINGS`:
             frequency  those that are active most often on the class's images (the source's)
             contrast   those that are active more often there than on the mean class's
    off_n    all latents but those;  n = M: everything (on), nothing (off)
    self_n   the n latents with the largest activation summed over the image's own tokens: no label

Images come class by class, so that a class's counts are final when its images have passed: until
then their reconstructions and sparse codes wait in memory, and prefix, encoder and decoder run once
per image. Contrast needs the counts of all classes before the first image is evaluated: a pass
more, which counts. The codes of the n latents are looked up, not computed again: one at the
threshold could change sides. off_n is the whole less on_n, as decoding is linear. Each setting runs
the tail alone, a sixth of a block at layer -2.

B images, T tokens of an image, d width, M latents, C classes, N images of the split, n latents
kept.
"""

from collections import defaultdict
from collections.abc import Sequence
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor

from clipsae.evaluation.numbers import SETTINGS
from clipsae.evaluation.passes import Batch, Stream
from clipsae.evaluation.ranking import RANKINGS, ClassCounts, contrast, ranked, top_latents
from clipsae.sae import SAE, SparseCodes

PROTOCOLS = ("paper", "heldout")

# (sae, setting, n), such as ("topk", "on", 5).
Key = tuple[str | None, str, int | None]
NO_SAE: Key = (None, "no_sae", None)


def check_topn_options(
    ns: Sequence[int], protocol: str, settings: Sequence[str], ranking: str = "frequency"
) -> None:
    """Refuse invalid options of a top-n evaluation.

    Raises:
        ValueError: no or wrong numbers of latents, an unknown protocol, ranking or setting.
    """
    if not ns or any(n < 1 for n in ns):
        raise ValueError(f"ns={list(ns)}: expected numbers of latents, each at least 1")
    if protocol not in PROTOCOLS:
        raise ValueError(f"protocol={protocol!r}: expected one of {', '.join(PROTOCOLS)}")
    if ranking not in RANKINGS:
        raise ValueError(f"ranking={ranking!r}: expected one of {', '.join(RANKINGS)}")
    unknown = [setting for setting in settings if setting not in SETTINGS]
    if unknown or not settings:
        raise ValueError(f"settings={list(settings)}: expected some of {', '.join(SETTINGS)}")


def counts_first(protocol: str, ranking: str, settings: Sequence[str]) -> bool:
    """Whether a pass that counts latents comes before the one that evaluates."""
    return bool(set(settings) - {"no_sae"}) and (protocol == "heldout" or ranking == "contrast")


class Predictions(defaultdict[Key, Tensor]):
    """The predicted class of each of N images, LongTensor [N] per setting; -1: not evaluated."""

    def __init__(self, images: int) -> None:
        super().__init__(lambda: torch.full((images,), -1))


class _Waiting(NamedTuple):
    """An image whose settings are not run yet."""

    label: int
    place: int  # in the dataset
    reconstruction: Tensor
    scale: Tensor
    context: Tensor | None  # of CLIP's tail
    strongest: Tensor | None  # its own latents, of `self`
    codes: SparseCodes | None
    stream: Tensor | None  # all tokens, where the SAE does not replace them all
    kept: Tensor | None  # which of the SAE's tokens it replaces; None: all of them

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self[2:] if part is not None)


class TopN:
    """The settings of one SAE.

    Args:
        ns: numbers of latents; those below M are ranked, M is the whole dictionary.
        settings: some of `on`, `off`, `self`.
        count_threshold: a (token, latent) pair counts if its code is larger.
        ranking: one of `RANKINGS`.
        counting: whether the images are counted as they are evaluated, which frequency alone can
            do. Otherwise call `count` with all images first, and then `rank`.
        memory: bound in bytes on images that wait for their class. The images of a class that needs
            more are listed in `postponed`: after `close` pass them to `update` again.

    Attributes:
        latents: LongTensor [C, n], the ranked latents of each class; of a class without images the
            first n, as all are equal.
        images: LongTensor [C] on the CPU, images counted.
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
        ranking: str,
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
        m, device = sae.config["latents"], stream.classifier.device
        self.ns = sorted({n for n in ns if n < m})
        ns = [*self.ns, m]
        kept = {"on": ns, "off": ns, "self": self.ns}
        self.keys: list[Key] = [(name, s, n) for s in kept if s in settings for n in kept[s]]
        self.ranks = bool(self.ns) and bool({"on", "off"} & set(settings))
        most = max(self.ns, default=0)
        self.latents = torch.arange(most, device=device).repeat(len(stream.classifier), 1)
        self.images = torch.zeros(len(stream.classifier), dtype=torch.long)
        self.postponed: set[int] = set()
        self._first_pass = True
        # Counts [M] of the class whose images are coming: those of all classes, [C, M], would be
        # 0.8 GB for each SAE at the paper's size. Contrast keeps them without their zeros.
        self._class: int | None = None
        self._counts = torch.zeros(m, dtype=torch.long, device=device)
        self._sums = torch.zeros(m, dtype=torch.float64, device=device)
        self._above, self._active = torch.zeros(2, dtype=torch.long, device=device).unbind()
        self._classes: list[ClassCounts] | None = [] if ranking == "contrast" else None
        self._waiting: list[_Waiting] = []
        self._too_large: int | None = None  # a class

    @property
    def share_above_threshold(self) -> float:
        """Of the active pairs that were counted; 0 of none."""
        return (self._above / self._active.clamp(min=1)).item()

    def count(self, batch: Batch) -> None:
        """Count the latents of images, which come class by class."""
        codes = batch.sparse
        counts, sums = codes.count(codes.values > self.count_threshold), codes.totals()
        self._above += counts.sum()
        self._active += len(codes.values)
        for label, group in groupby(enumerate(batch.labels.tolist()), key=lambda pair: pair[1]):
            places = [row for row, _ in group]
            rows = slice(places[0], places[-1] + 1)
            if label != self._class:
                self._end_class()
                if self.images[label]:
                    raise ValueError(f"images of class {label} must be consecutive")
                self._class = label
            self._counts += counts[rows].sum(dim=0)
            self._sums += sums[rows].sum(dim=0)
            self.images[label] += len(places)

    def rank(self) -> None:
        """All images are counted: rank the latents of the classes that are not ranked yet."""
        self._end_class()
        if self._classes:
            n, m = self.latents.shape[1], len(self._counts)
            device = self.latents.device
            for label, scores, sums in contrast(self._classes, m, device):
                self.latents[label] = ranked(scores, sums, n)
            self._classes = []

    def _end_class(self) -> None:
        """The images of a class are complete: rank its latents, or keep what they are ranked by."""
        if self._class is None:
            return
        if self._classes is None:
            self.latents[self._class] = ranked(self._counts, self._sums, self.latents.shape[1])
        else:
            images = int(self.images[self._class])
            found = ClassCounts.of(self._class, images, self._counts, self._sums)
            self._classes.append(found)
        self._counts.zero_()
        self._sums.zero_()
        self._class = None

    def update(self, batch: Batch) -> None:
        """Add images, which come class by class; in a second pass those of `postponed` count."""
        labels, indices = batch.labels.tolist(), batch.indices.tolist()
        rows = [i for i, at in enumerate(indices) if self._first_pass or at in self.postponed]
        if not rows:
            return
        if self.counting:
            self.count(batch)
        looked_up = bool(self.ns) and bool({"on", "off", "self"} & set(self.settings))
        strongest = None
        if self.ns and "self" in self.settings:
            strongest = top_latents(batch.sparse.totals(), max(self.ns))
        whole = batch.kept is None and batch.targets.shape == batch.streams.shape
        for i in rows:
            if labels[i] == self._too_large:
                self.postponed.add(indices[i])
                continue
            image = _Waiting(
                labels[i],
                indices[i],
                # Copies: views would hold the whole batch.
                batch.reconstruction[i].clone(),
                batch.scale[i].clone(),
                None if batch.context is None else batch.context[i].clone(),
                None if strongest is None else strongest[i],
                batch.sparse[i].compact() if looked_up else None,
                None if whole else batch.streams[i].clone(),
                None if batch.kept is None else batch.kept[i],
            )
            self._waiting.append(image)
        self._run(at_least=self.stream.batch_size)
        if self._bytes() > self.memory:
            self._run(at_least=1)
        if self._bytes() > self.memory:
            self.postponed |= {image.place for image in self._waiting}
            self._too_large = self._class
            self._waiting = []

    def close(self) -> None:
        """End a pass of `update`: run all images that wait. In the next one nothing is counted."""
        self._end_class()
        self._run(at_least=1)
        self.counting, self._first_pass, self._too_large = False, False, None

    def _bytes(self) -> int:
        return sum(image.nbytes for image in self._waiting)

    def _run(self, at_least: int) -> None:
        """Run the images whose class is complete, in batches across classes."""
        incomplete = self._class if self.ranks else None
        ready = sum(image.label != incomplete for image in self._waiting)
        while ready >= at_least:
            take = min(ready, self.stream.batch_size)
            batch, self._waiting = self._waiting[:take], self._waiting[take:]
            ready -= take
            self._predict(batch)

    def _predict(self, batch: list[_Waiting]) -> None:
        indices = torch.tensor([image.place for image in batch])
        whole = torch.stack([image.reconstruction for image in batch])
        scale = torch.stack([image.scale for image in batch])
        contexts = [image.context for image in batch if image.context is not None]
        context = torch.stack(contexts) if contexts else None
        no_codes = scale.new_zeros(*scale.shape[:-1], 0), scale, self.latents.new_zeros(0)
        nothing = self.sae.decode(*no_codes)  # the bias

        def add(setting: str, n: int, tokens: Tensor) -> None:
            if setting in self.settings:
                predicted = self.stream.predict(self._replaced(batch, tokens), context)
                self.predictions[self.name, setting, n][indices] = predicted.cpu()

        m = self.sae.config["latents"]
        add("on", m, whole)
        add("off", m, nothing.expand_as(whole))
        chosen = []
        if self.ranks:
            chosen.append((self.latents[[image.label for image in batch]], "on", "off"))
        if self.ns and "self" in self.settings:
            strongest = [image.strongest for image in batch if image.strongest is not None]
            chosen.append((torch.stack(strongest), "self", ""))
        for latents, on, off in chosen:
            # The codes [B, T, n] of the most latents serve all n.
            images = [image.codes for image in batch if image.codes is not None]
            codes = torch.stack([z.lookup(n) for z, n in zip(images, latents, strict=True)])
            for n in self.ns:
                few = self.sae.decode(codes[..., :n].contiguous(), scale, latents[:, :n])
                add(on, n, few)
                if off in self.settings:
                    add(off, n, whole - few + nothing)  # the bias is in both

    def _replaced(self, batch: list[_Waiting], tokens: Tensor) -> Tensor:
        """The images' streams with their tokens replaced by [B, T, d] where the SAE does so."""
        streams = [image.stream for image in batch if image.stream is not None]
        if not streams:
            return tokens
        clip, of, around = self.stream.clip, self.stream.of, torch.stack(streams)
        kept = [image.kept for image in batch if image.kept is not None]
        if kept:
            own = around[:, clip.token_slice(of)]
            tokens = torch.where(torch.stack(kept)[..., None], tokens, own)
        return clip.with_tokens(around, tokens, of)


def per_class_accuracy(predictions: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Accuracy of each class in percent, float64 [C]; NaN without images.

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
    ranking: str,
) -> list[dict[str, Any]]:
    """The tidy rows: for each SAE `no_sae` and then its own settings, in the given order."""
    rows = []
    names: Sequence[str | None] = saes or [None]
    for name in names:
        for key in [key for key in predictions if key[0] in (None, name)]:
            predicted, accuracy = predictions[key], by_class[key]
            seen = predicted >= 0
            rows.append(
                {
                    "sae": name,
                    "protocol": protocol,
                    "ranking": ranking,
                    "setting": key[1],
                    "n": key[2],
                    # Over the classes that have images: torchmetrics' macro average would count
                    # one that is predicted but absent as 0.
                    "accuracy": accuracy.nanmean().item(),
                    "micro_accuracy": 100 * (predicted == labels)[seen].double().mean().item(),
                    "images": int(seen.sum()),
                    "classes": int((~accuracy.isnan()).sum()),
                    "competing": len(accuracy),
                }
            )
    return rows

"""One SAE on the stream of images of a top-n evaluation: encode once, run the tail per setting.

B images, T tokens of an image, d width, M latents, C classes, N images of the split, n latents
kept.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from clipsae.clip import FrozenCLIP
from clipsae.evaluation.encoding import Encoded, encode_images
from clipsae.evaluation.ranking import ClassRankings, top_latents
from clipsae.evaluation.result import Key
from clipsae.evaluation.sparsity import SparsityMetrics
from clipsae.sae import SAE, SparseCodes

_ON_AND_OFF = ("on", "off")


class Predictions:
    """The predicted class of every image in every setting; -1 where there is none yet.

    Args:
        classifier: [C, e], on the model's device.
        images: N.
    """

    def __init__(self, clip: FrozenCLIP, classifier: Tensor, images: int) -> None:
        self.clip = clip
        self.classifier = classifier
        self.images = images
        self._found: dict[Key, Tensor] = {}

    def add(self, key: Key, tokens: Tensor, indices: Tensor) -> None:
        """Predict from the residual streams [B, T, d] of the images `indices`, LongTensor [B]."""
        predicted = self.logits(tokens).argmax(dim=-1)
        if key not in self._found:
            self._found[key] = torch.full((self.images,), -1, device=predicted.device)
        self._found[key][indices.to(predicted.device)] = predicted

    def logits(self, tokens: Tensor) -> Tensor:
        """[B, C]: cosines with the classifier's rows, if those are of unit length."""
        return nn.functional.normalize(self.clip.tail(tokens), dim=-1) @ self.classifier.T

    def of(self, key: Key) -> Tensor:
        """LongTensor [N] on the CPU."""
        return self._found[key].cpu()


@dataclass(frozen=True)
class _Held:
    """An image that waits for its class to be complete."""

    label: int
    index: int
    reconstruction: Tensor
    scale: Tensor
    codes: SparseCodes

    @property
    def nbytes(self) -> int:
        return self.reconstruction.nbytes + self.scale.nbytes + self.codes.nbytes


class SingleSAE:
    """The settings of one SAE.

    Args:
        ns: numbers of latents; those below M are ranked, M is the whole dictionary.
        settings: those of `on`, `off`, `self` that are wanted.
        count_threshold: a (token, latent) pair counts if its code is larger.
        memory: bytes that images which wait for their class may take. The images of a class that
            needs more are listed in `postponed`, to be given to `evaluate_ranked` later.
        sparsity: also collect corpus metrics.
    """

    def __init__(
        self,
        name: str,
        sae: SAE,
        predictions: Predictions,
        *,
        ns: Sequence[int],
        settings: Sequence[str],
        count_threshold: float,
        batch_size: int,
        memory: float,
        sparsity: bool = False,
    ) -> None:
        self.name = name
        self.sae = sae
        self.predictions = predictions
        self.settings = settings
        self.count_threshold = count_threshold
        self.batch_size = batch_size
        self.memory = memory
        device = predictions.classifier.device
        self.latents: int = sae.config["latents"]
        self.ns = sorted({n for n in ns if n < self.latents})
        self.ranks = bool(self.ns) and bool({"on", "off"} & set(settings))
        self.rankings = ClassRankings(
            len(predictions.classifier), self.latents, max(self.ns, default=0), device
        )
        self.sparsity = SparsityMetrics(sae.config["d"], self.latents) if sparsity else None
        if self.sparsity is not None:
            self.sparsity.to(device)
        self.postponed: list[int] = []
        self._too_large: int | None = None
        self._held: list[_Held] = []
        self._held_bytes = 0
        self._above, self._active_counted, self._active, self._tokens = torch.zeros(
            4, dtype=torch.long, device=device
        ).unbind()

    @property
    def keys(self) -> list[Key]:
        """All settings in the order of the result's rows."""
        ns = {"on": [*self.ns, self.latents], "off": [*self.ns, self.latents], "self": self.ns}
        return [(self.name, s, n) for s in ns if s in self.settings for n in ns[s]]

    def count(self, tokens: Tensor, labels: list[int]) -> None:
        """Count the latents of images [B, T, d], given in the order of their classes."""
        found = encode_images(self.sae, tokens, count_above=self.count_threshold, decode=False)
        self._count(found, labels)

    def evaluate(
        self, tokens: Tensor, labels: list[int], indices: Tensor, *, counting: bool
    ) -> None:
        """Run the settings on images [B, T, d], given in the order of their classes.

        Args:
            indices: LongTensor [B], of the images in their split.
            counting: these images are what is counted, too: `on_n` and `off_n` of a class follow
                when it is complete. Otherwise its ranking must be known.
        """
        latents = self.rankings.latents[labels] if self.ranks and not counting else None
        own = partial(top_latents, n=max(self.ns)) if self.ns and "self" in self.settings else None
        found = encode_images(
            self.sae,
            tokens,
            count_above=self.count_threshold if counting else None,
            latents=latents,
            own=own,
            hold=self.ranks and counting,
            observe=None if self.sparsity is None else self.sparsity.update,
        )
        self._active += found.active.sum()
        self._tokens += tokens.shape[0] * tokens.shape[1]
        if "on" in self.settings:
            key = (self.name, "on", self.latents)
            self.predictions.add(key, found.reconstruction, indices)
        if "off" in self.settings:
            key = (self.name, "off", self.latents)
            self.predictions.add(key, self._nothing(found.scale).expand_as(tokens), indices)
        if own is not None:
            self._run(["self"], found.own_codes, found.own, found, indices)
        if latents is not None:
            self._run(_ON_AND_OFF, found.kept, latents, found, indices)
        if counting:
            self._count(found, labels)
            if self.ranks:
                self._hold(found, labels, indices)

    def evaluate_ranked(self, tokens: Tensor, labels: list[int], indices: Tensor) -> None:
        """`on_n` and `off_n` of those of the images [B, T, d] that were postponed."""
        postponed = set(self.postponed)
        mine = [i for i, index in enumerate(indices.tolist()) if index in postponed]
        if mine:
            latents = self.rankings.latents[[labels[i] for i in mine]]
            found = encode_images(self.sae, tokens[mine], latents=latents)
            self._run(_ON_AND_OFF, found.kept, latents, found, indices[mine])

    def pass_is_over(self) -> None:
        """The last class is complete: all that was held is run."""
        self.rankings.close()
        self._run_held(at_least=1)

    def diagnostics(self) -> tuple[float, float]:
        """Share of active pairs above the count threshold (0 of none), and active latents of a
        token."""
        share = (self._above / self._active_counted.clamp(min=1)).item()
        return share, (self._active / self._tokens).item()

    def sparsity_values(self) -> dict[str, float]:
        """The corpus metrics as plain numbers; none where they were not asked for."""
        if self.sparsity is None:
            return {}
        return {name: float(value) for name, value in self.sparsity.compute().items()}

    def _count(self, found: Encoded, labels: list[int]) -> None:
        self._above += found.counts.sum()
        self._active_counted += found.active.sum()
        self.rankings.add(labels, found.counts, found.sums)

    def _hold(self, found: Encoded, labels: list[int], indices: Tensor) -> None:
        for i, (label, index) in enumerate(zip(labels, indices.tolist(), strict=True)):
            if label == self._too_large:
                self.postponed.append(index)
                continue
            # A copy of the row: a view would hold the whole batch.
            rows = found.reconstruction[i].clone(), found.scale[i].clone()
            self._held.append(_Held(label, index, *rows, found.sparse[i]))
            self._held_bytes += self._held[-1].nbytes
        self._run_held(at_least=self.batch_size)
        if self._held_bytes > self.memory:
            self._run_held(at_least=1)
        if self._held_bytes > self.memory:
            self.postponed += [held.index for held in self._held]
            self._too_large = self.rankings.open
            self._held, self._held_bytes = [], 0

    def _run_held(self, at_least: int) -> None:
        """Run the images whose class is complete, in batches of `batch_size` across classes."""
        ready = sum(held.label != self.rankings.open for held in self._held)
        while ready >= at_least:
            batch = self._held[: min(ready, self.batch_size)]
            self._held = self._held[len(batch) :]
            self._held_bytes -= sum(held.nbytes for held in batch)
            ready -= len(batch)
            latents = self.rankings.latents[[held.label for held in batch]]
            codes = [held.codes.lookup(latents[i]) for i, held in enumerate(batch)]
            found = Encoded(
                active=latents.new_zeros(0),
                reconstruction=torch.stack([held.reconstruction for held in batch]),
                scale=torch.stack([held.scale for held in batch]),
            )
            indices = torch.tensor([held.index for held in batch])
            self._run(_ON_AND_OFF, torch.stack(codes), latents, found, indices)

    def _run(
        self,
        settings: Sequence[str],
        codes: Tensor,
        latents: Tensor,
        found: Encoded,
        indices: Tensor,
    ) -> None:
        """One tail for each n and setting: codes [B, T, n] of latents [B, n], the first k of which
        serve k."""
        wanted = [setting for setting in settings if setting in self.settings]
        for n in self.ns if wanted else ():
            few = self.sae.decode(codes[..., :n].contiguous(), found.scale, latents[:, :n])
            for setting in wanted:
                stream = few
                if setting == "off":  # the bias is in both
                    assert found.reconstruction is not None
                    stream = found.reconstruction - few + self._nothing(found.scale)
                self.predictions.add((self.name, setting, n), stream, indices)

    def _nothing(self, scale: Tensor) -> Tensor:
        """What no latent at all decodes to: the bias, [B, T, d]; or [B, T, 1] of zeros."""
        bias = self.sae.decoder_bias
        return torch.zeros_like(scale) if bias is None else bias * scale

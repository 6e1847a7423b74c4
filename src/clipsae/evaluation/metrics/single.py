"""The metrics of one SAE on a stream of batches: encode once, show each metric what it needs.

B images, T tokens of an image, d width, M latents, e embedding size, V concepts.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torchmetrics import Metric

from clipsae.evaluation.metrics.cknna import CKNNA
from clipsae.evaluation.metrics.monosemanticity import MonoSemanticity, pool_codes
from clipsae.evaluation.metrics.orthogonality import decoder_orthogonality
from clipsae.evaluation.metrics.recovery import ConceptRecovery
from clipsae.evaluation.sparsity import SparsityMetrics
from clipsae.sae import SAE

METRICS = ("sparsity", "dense", "cknna", "orthogonality", "monosemanticity", "recovery")
LEVELS = ("patch", "image")

# Scores, codes and comparisons of a group of images are alive together.
_DENSE_BYTES = 256 * 2**20

_SUMMARIES = {
    "concepts_found": "concepts_found",
    "mean_auroc": "auroc",
    "mean_f1": "f1",
    "mean_purity": "purity",
    "splitting": "splitting",
    "merging": "merging",
}


@dataclass(frozen=True)
class Options:
    """Which metrics, and their settings (see `measure`)."""

    metrics: tuple[str, ...]
    pooling: str = "mean"
    k: int = 10
    threshold: float = 0.9


@dataclass
class Batch:
    """Images and what is known of them.

    Attributes:
        tokens: [B, T, d], the patches last.
        sampled_tokens: positions among the B x T tokens that CKNNA compares, ascending.
        embeddings: [B, e] of the separate image encoder, or None.
        sampled_images: positions among the B images that recovery compares, ascending.
        patch_truth: bool [sampled images, patches, V].
        image_truth: bool [sampled images, V'].
    """

    tokens: Tensor
    sampled_tokens: list[int]
    embeddings: Tensor | None
    sampled_images: list[int]
    patch_truth: Tensor | None
    image_truth: Tensor | None


def code_without_selection(sae: SAE, scores: Tensor, tau: Tensor) -> Tensor:
    """The code as if its threshold were lowered to zero where it is above: [..., M].

    What Table 5 of the paper must have counted (K = 32 codes cannot be as dense as it says): MSAE
    reports codes after the top-k and "all", the ReLU without it. For TopK, BatchTopK, JumpReLU and
    Sparsemax in `scores` it is the ReLU of the scores, for ReLU the code itself. A threshold below
    zero stays (a Gated SAE's, with a positive bias of its gate; Sparsemax's of a token whose
    scores are small): the code's own latents are always among these.
    """
    return sae.apply_threshold(scores, tau.clamp(max=0))


# What of `values` takes long.
_LONG = {"cknna": "CKNNA", "patch": "recovery in patches", "image": "recovery in images"}


class SingleMeasure:
    """One SAE's metrics; made when the first batch shows their sizes.

    Attributes:
        progress: of `values`, called with (done, total, what); None: not told.
        scores: float64 [M] after `values`, where MonoSemanticity is measured.
        recovered: after `values`, per level, where recovery is measured.
    """

    def __init__(self, sae: SAE, options: Options) -> None:
        self.sae = sae
        self.options = options
        self.progress: Callable[[int, int, str], None] | None = None
        self.latents: int = sae.config["latents"]
        self.scores: Tensor | None = None
        self.recovered: dict[str, dict[str, Tensor]] = {}
        self._metrics: dict[str, Metric] = {}

    def update(self, batch: Batch) -> None:
        """Encode a batch, in groups of images whose dense codes fit in memory."""
        b, t, _ = batch.tokens.shape
        group = max(1, _DENSE_BYTES // (t * self.latents * batch.tokens.element_size()))
        for start in range(0, b, group):
            stop = min(start + group, b)
            images = [i for i, at in enumerate(batch.sampled_images) if start <= at < stop]
            self._update_group(
                batch.tokens[start:stop],
                [at - start * t for at in batch.sampled_tokens if start * t <= at < stop * t],
                None if batch.embeddings is None else batch.embeddings[start:stop],
                [batch.sampled_images[i] - start for i in images],
                None if batch.patch_truth is None else batch.patch_truth[images],
                None if batch.image_truth is None else batch.image_truth[images],
            )

    def _update_group(
        self,
        x: Tensor,
        sampled_tokens: list[int],
        embeddings: Tensor | None,
        sampled_images: list[int],
        patch_truth: Tensor | None,
        image_truth: Tensor | None,
    ) -> None:
        wanted, sae, d = self.options.metrics, self.sae, x.shape[-1]
        scores = sae.scores(x)
        tau = sae.threshold(scores)
        codes = sae.apply_threshold(scores, tau)
        if "sparsity" in wanted or "dense" in wanted:
            scale = sae.input_scale(x)
            for name in ("sparsity", "dense"):
                if name not in wanted:
                    continue
                of = codes if name == "sparsity" else code_without_selection(sae, scores, tau)
                metric = self._metric(name, SparsityMetrics, x, d, self.latents)
                metric.update(x, sae.decode(of, scale), of)
        del scores
        if sampled_tokens:
            metric = self._metric("cknna", CKNNA, x, d, self.latents, self.options.k)
            metric.update(x.flatten(0, 1)[sampled_tokens], codes.flatten(0, 1)[sampled_tokens])
        if embeddings is not None or sampled_images:
            pooled = pool_codes(codes, self.options.pooling)
        if embeddings is not None:
            size = embeddings.shape[1]
            metric = self._metric("monosemanticity", MonoSemanticity, x, self.latents, size)
            metric.update(pooled, embeddings)
        if sampled_images:
            assert patch_truth is not None
            assert image_truth is not None
            patches = codes[sampled_images, -patch_truth.shape[1] :]
            for level, of, truth in (
                ("patch", patches.flatten(0, 1), patch_truth.flatten(0, 1)),
                ("image", pooled[sampled_images], image_truth),
            ):
                sizes = self.latents, truth.shape[1], self.options.threshold
                self._metric(level, ConceptRecovery, x, *sizes).update(of, truth)

    def _metric(self, name: str, kind: type, like: Tensor, *size: float) -> Metric:
        if name not in self._metrics:
            self._metrics[name] = kind(*size).to(like.device)
        return self._metrics[name]

    def values(self) -> dict[str, Tensor]:
        """All numbers by name, scalars."""
        found: dict[str, Tensor] = {}
        for name in ("cknna", *LEVELS):
            if name in self._metrics and self.progress is not None:
                self._metrics[name].progress = partial(_told, self.progress, _LONG[name])
        for name, suffix in (("sparsity", ""), ("dense", "_dense")):
            if name in self._metrics:
                of = self._metrics[name].compute()
                found |= {f"{key}{suffix}": value for key, value in of.items()}
        if "cknna" in self._metrics:
            found["cknna"] = self._metrics["cknna"].compute()
        if "orthogonality" in self.options.metrics:
            found["decoder_orthogonality"] = decoder_orthogonality(self.sae.decoder_rows())
        if "monosemanticity" in self._metrics:
            of = self._metrics["monosemanticity"].compute()
            self.scores = torch.atleast_1d(of.pop("scores"))
            found |= {f"monosemanticity_{key}": value for key, value in of.items()}
        for level in LEVELS:
            if level in self._metrics:
                of = self._metrics[level].compute()
                self.recovered[level] = of
                found |= {f"{level}_{short}": of[key] for key, short in _SUMMARIES.items()}
        for name in ("cknna", *LEVELS):
            compared = getattr(self._metrics.get(name), "compared", None)
            if compared is not None:  # a part of the sample: see `SampledCodes`
                found[f"{name}_compared"] = torch.tensor(float(compared))
        return found


def _told(progress: Callable[[int, int, str], None], what: str, done: int, total: int) -> None:
    progress(done, total, what)

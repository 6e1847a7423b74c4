"""All metrics that stream over images, for several SAEs of one CLIP, in one pass.

Prefix and image encoder run once per image, each SAE encodes it once.

B images, T tokens of an image, d width, M latents, e embedding size, N images, V concepts.
"""

import random
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from clipsae.clip import FrozenCLIP
from clipsae.data.loader import image_batches
from clipsae.evaluation.metrics.encoders import image_encoder as encoder_by_name
from clipsae.evaluation.metrics.monosemanticity import POOLINGS
from clipsae.evaluation.metrics.single import METRICS, Batch, Options, SingleMeasure
from clipsae.evaluation.metrics.truth import (
    IMAGE_ATTRIBUTES,
    PATCH_ATTRIBUTES,
    concept_names,
    has_truth,
    image_concepts,
    patch_concepts,
)
from clipsae.evaluation.passes import evenly_spaced, in_eval_mode
from clipsae.sae import SAE

Encoder = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class MeasureResult:
    """What `measure` found.

    Attributes:
        rows: tidy, one dict a number: sae, metric, value (float; NaN where undefined).
        scores: per SAE the MonoSemanticity of each latent, float64 [M]; NaN for dead ones.
        recovery: per SAE and level ("patch", "image") what `concept_recovery` returns.
        concepts: per level the names of its V concepts.
        images: N, those that were looked at.
        sampled_tokens, sampled_images: how many CKNNA, and concept recovery, rest on.
        pooling, image_encoder: what MonoSemanticity was computed with.
    """

    rows: list[dict[str, Any]]
    images: int
    sampled_tokens: int
    sampled_images: int
    pooling: str
    image_encoder: str | None
    scores: dict[str, Tensor] = field(default_factory=dict)
    recovery: dict[str, dict[str, dict[str, Tensor]]] = field(default_factory=dict)
    concepts: dict[str, list[str]] = field(default_factory=dict)


@torch.no_grad()
def measure(
    clip: FrozenCLIP,
    saes: Mapping[str, SAE],
    dataset: Any,
    *,
    metrics: Sequence[str] | None = None,
    image_encoder: str | Encoder | None = None,
    pooling: str = "mean",
    batch_size: int = 32,
    num_workers: int = 0,
    device: torch.device | str | None = None,
    seed: int = 0,
    sample_tokens: int = 10_000,
    sample_images: int = 2_000,
    k: int = 10,
    threshold: float = 0.9,
    limit_images: int | None = None,
    progress: Callable[[int, int, str], None] | None = None,
) -> MeasureResult:
    """Measure SAEs of one layer of one CLIP on one dataset.

    Args:
        saes: by name; each reads tokens of `clip.prefix`.
        dataset: `labels` LongTensor [N], items (uint8 [3, S, S], label).
        metrics: some of
            "sparsity": what `sparsity_values` returns;
            "dense": the same, with the suffix _dense, of the code without its selection;
            "cknna"; "orthogonality" (of the decoder);
            "monosemanticity": its mean, max and number of live latents;
            "recovery": concepts_found, auroc, ... with the prefixes patch_ and image_.
            None: all for which there is what they need.
        image_encoder: for MonoSemanticity: a name for `image_encoder`, or a callable
            (images uint8 [B, 3, S, S], indices [B]) -> [B, e].
        pooling: of token codes to image codes (`pool_codes`).
        device: moves the models there; None: where `clip` is.
        seed: of the samples, which depend on it and on the number of images alone.
        sample_tokens: tokens, drawn from all, that CKNNA compares (at most; N^2 work). They make
            one batch, up to MSAE's 10,000, and full batches of that size beyond.
        sample_images: images, drawn from all, whose patches and pooled codes recovery compares.
        k: neighbours of CKNNA.
        threshold: the AUROC from which a latent counts as good for a concept.
        limit_images: that many images only, evenly spaced over the classes.
        progress: called with (done, total, what): images, then what CKNNA and recovery compare.

    Raises:
        ValueError: an unknown metric or pooling, one that lacks what it needs, no images, sizes
            below 1.
    """
    chosen = check_measure_options(
        clip,
        dataset,
        metrics=metrics,
        image_encoder=image_encoder,
        pooling=pooling,
        sample_tokens=sample_tokens,
        sample_images=sample_images,
    )
    device = clip.device if device is None else torch.device(device)
    clip.to(device)
    encoder = image_encoder if "monosemanticity" in chosen else None
    if isinstance(encoder, str):
        encoder = encoder_by_name(encoder, dataset)
    if isinstance(encoder, nn.Module):
        encoder.to(device)
    indices = evenly_spaced(dataset.labels, limit_images)
    tokens = _drawn(len(indices) * clip.tokens, sample_tokens, seed) if "cknna" in chosen else []
    images = _drawn(len(indices), sample_images, seed) if "recovery" in chosen else []
    options = Options(chosen, pooling, k, threshold)
    runs = {name: SingleMeasure(sae.to(device), options) for name, sae in saes.items()}

    done = compared_tokens = compared_images = 0  # images that cannot be read may be left out
    with in_eval_mode(saes.values()):
        for pixels, _, found in image_batches(dataset, batch_size, num_workers, indices):
            stop = done + len(found)
            of_tokens = _within(tokens, done * clip.tokens, stop * clip.tokens)
            of_images = _within(images, done, stop)
            pixels = pixels.to(device)
            batch = Batch(
                tokens=clip.prefix(clip.normalize(pixels)),
                sampled_tokens=of_tokens,
                embeddings=None if encoder is None else encoder(pixels, found),
                sampled_images=of_images,
                patch_truth=None,
                image_truth=None,
            )
            if of_images:
                known = found[of_images]
                batch.patch_truth = patch_concepts(dataset, known, clip.grid[0]).to(device)
                batch.image_truth = image_concepts(dataset, known).to(device)
            for run in runs.values():
                run.update(batch)
            done = stop
            compared_tokens += len(of_tokens)
            compared_images += len(of_images)
            if progress is not None:
                progress(done, len(indices), "images")
    if not done:
        raise ValueError("none of the dataset's images could be read")
    for run in runs.values():
        run.progress = progress
    return _result(runs, done, compared_tokens, compared_images, pooling, encoder)


def check_measure_options(
    clip: FrozenCLIP,
    dataset: Any,
    *,
    metrics: Sequence[str] | None = None,
    image_encoder: str | Encoder | None = None,
    pooling: str = "mean",
    sample_tokens: int = 10_000,
    sample_images: int = 2_000,
) -> tuple[str, ...]:
    """Refuse what `measure` would, before it begins.

    Returns:
        The metrics that will be measured.

    Raises:
        ValueError: see `measure`.
    """
    if pooling not in POOLINGS:
        raise ValueError(f"pooling={pooling!r}: expected one of {', '.join(POOLINGS)}")
    if pooling == "cls" and not clip.prefix_tokens:
        raise ValueError(f"pooling='cls': {clip.name} has no class token; use mean or max")
    for name, value in (("sample_tokens", sample_tokens), ("sample_images", sample_images)):
        if value < 1:
            raise ValueError(f"{name}={value}: expected at least 1")
    if not len(dataset.labels):
        raise ValueError("the dataset has no images: expected at least one")
    missing = {}
    if image_encoder is None:
        missing["monosemanticity"] = "an image_encoder, such as 'open_clip:ViT-B-32/openai'"
    if not has_truth(dataset):
        missing["recovery"] = "a dataset with ground truth, such as the built-in scenes"
    check_metrics(metrics)
    if metrics is None:
        return tuple(metric for metric in METRICS if metric not in missing)
    for metric in metrics:
        if metric in missing:
            raise ValueError(f"metrics: {metric!r} needs {missing[metric]}")
    return tuple(metrics)


def check_metrics(metrics: Sequence[str] | None) -> None:
    """Refuse names that are no metrics of `measure`.

    Raises:
        ValueError: an unknown name, or none at all.
    """
    if metrics is not None and (not metrics or set(metrics) - set(METRICS)):
        raise ValueError(f"metrics={list(metrics)}: expected some of {', '.join(METRICS)}")


def _drawn(total: int, size: int, seed: int) -> list[int]:
    """Ascending positions, drawn without replacement; all where there are no more."""
    return sorted(random.Random(seed).sample(range(total), min(size, total)))


def _within(positions: list[int], start: int, stop: int) -> list[int]:
    """The positions in start .. stop - 1, counted from start."""
    of = slice(bisect_left(positions, start), bisect_left(positions, stop))
    return [position - start for position in positions[of]]


def _result(
    runs: dict[str, SingleMeasure],
    images: int,
    sampled_tokens: int,
    sampled_images: int,
    pooling: str,
    encoder: Encoder | None,
) -> MeasureResult:
    rows, scores, recovery = [], {}, {}
    for name, run in runs.items():
        values = run.values()
        rows += [{"sae": name, "metric": m, "value": float(v)} for m, v in values.items()]
        if run.scores is not None:
            scores[name] = run.scores.cpu()
        if run.recovered:
            recovery[name] = {
                level: {key: value.cpu() for key, value in found.items()}
                for level, found in run.recovered.items()
            }
    concepts = {"patch": PATCH_ATTRIBUTES, "image": IMAGE_ATTRIBUTES} if recovery else {}
    return MeasureResult(
        rows=rows,
        images=images,
        sampled_tokens=sampled_tokens,
        sampled_images=sampled_images,
        pooling=pooling,
        image_encoder=None if encoder is None else getattr(encoder, "name", repr(encoder)),
        scores=scores,
        recovery=recovery,
        concepts={level: concept_names(names) for level, names in concepts.items()},
    )

"""SAEs of one layer of one CLIP on one dataset: top-n classification and measurements in one pass.

N images of the split, T tokens of an image, C classes, M latents, e embedding size, n latents kept.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from clipsae.clip import FrozenCLIP
from clipsae.data.captions import captions_differ
from clipsae.evaluation.encoders import image_encoder as encoder_by_name
from clipsae.evaluation.encoders import judge
from clipsae.evaluation.metrics import METRICS, Options
from clipsae.evaluation.metrics.base import NEEDS
from clipsae.evaluation.numbers import SETTINGS
from clipsae.evaluation.passes import (
    POOLINGS,
    Batch,
    Encoder,
    Images,
    Progress,
    Stream,
    evenly_spaced,
    place_of,
)
from clipsae.evaluation.topn import (
    NO_SAE,
    Key,
    Predictions,
    TopN,
    check_topn_options,
    counts_first,
    make_rows,
    per_class_accuracy,
)
from clipsae.evaluation.truth import has_patch_truth, has_truth, patch_concept_names
from clipsae.sae import SAE

SHARE_IMAGES = 200  # that `count_share` sets thresholds on


@dataclass(frozen=True)
class Evaluation:
    """Results of `evaluate`. Without top-n classification its attributes are empty.

    Attributes:
        rows: of top-n classification, tidy, one dict a setting: sae, protocol, ranking, setting
            ("no_sae", "on", "off", "self"), n (None for no_sae), accuracy (macro, %),
            micro_accuracy (%), images, classes (those with images), competing (those that could be
            predicted).
            `no_sae` is repeated for each SAE.
        class_accuracy: per key the accuracy of each class in %, [C]; NaN without images.
        predictions: per key the predicted class of each image, LongTensor [N]; -1: not evaluated.
        labels: LongTensor [N], of the evaluated split.
        latents: per SAE the ranked latents of each class, LongTensor [C, n].
        counted_images: LongTensor [C], images that a class's ranking rests on; where it is 0, the
            ranking is the first n latents and means nothing.
        count_threshold: per SAE.
        share_above_threshold: per SAE, the share of active (token, latent) pairs of the counting
            split whose code exceeds the count threshold.
        metrics: the measured numbers, tidy, one dict a number: sae, metric, value (NaN: undefined).
        per_latent: per SAE numbers of each latent by name, [M]; NaN where undefined.
        concepts: per SAE a dict a concept: level, concept, its best latents.
        images: how many were evaluated.
        pooling, image_encoder: what MonoSemanticity was computed with (the first encoder).
    """

    rows: list[dict[str, Any]]
    class_accuracy: dict[Key, Tensor]
    predictions: dict[Key, Tensor]
    labels: Tensor
    latents: dict[str, Tensor]
    counted_images: Tensor
    count_threshold: dict[str, float]
    share_above_threshold: dict[str, float]
    metrics: list[dict[str, Any]]
    per_latent: dict[str, dict[str, Tensor]]
    concepts: dict[str, list[dict[str, Any]]]
    images: int
    pooling: str
    image_encoder: str | None


@torch.no_grad()
def evaluate(
    clip: FrozenCLIP,
    saes: Mapping[str, SAE],
    dataset: Any,
    classifier: Tensor | None = None,
    *,
    ns: Sequence[int] = (1, 5, 10, 50),
    protocol: str = "paper",
    ranking: str = "frequency",
    count_dataset: Any = None,
    count_threshold: float | Mapping[str, float] = 0.2,
    count_share: float | None = None,
    settings: Sequence[str] = tuple(SETTINGS),
    memory_gb: float = 4.0,
    metrics: Sequence[str] | None = None,
    image_encoder: str | Encoder | Sequence[str | Encoder] | None = None,
    pooling: str = "mean",
    k: int = 10,
    threshold: float = 0.9,
    seed: int = 0,
    sample_tokens: int = 10_000,
    sample_images: int = 2_000,
    batch_size: int = 32,
    num_workers: int = 0,
    device: torch.device | str | None = None,
    limit_images: int | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Evaluate SAEs on the same stream of images.

    Args:
        saes: by name; each has its own M and reads tokens of `clip.prefix`, all of them the same of
            an image's: the others pass unchanged, as do those that an SAE leaves out.
        dataset: the evaluated split: `labels` LongTensor [N], items (uint8 [3, S, S], label).
        classifier: [C, e], a row per class index, of unit length or not (then longer rows win).
            None: no top-n classification.
        ns: how many latents are kept; M is added for `on` and `off`.
        protocol: "paper" counts on the evaluated split itself, which is the published number;
            "heldout" counts on `count_dataset`.
        ranking: which latents stand for a class: "frequency", those active most often on its
            images, which is the published number; "contrast", those active more often there than
            on the mean class (`ranking.contrast`), which takes a pass more by the paper's protocol.
        count_threshold: a (token, latent) pair counts if its code is larger; one for all SAEs or
            one for each by name. 0.2 was tuned for codes of unnormalised tokens.
        count_share: in place of `count_threshold` each SAE has the threshold that this share of its
            active codes exceeds, on `SHARE_IMAGES` of the images that are counted: SAEs whose codes
            differ in size are then compared alike. 1.0: every active code counts.
        settings: which of no_sae, on, off, self; none: no top-n classification.
        memory_gb: bound on what waits for its class to be complete. The images of a class that
            needs more are encoded a second time instead, with the same results.
        metrics: names in `METRICS`, such as
            "sparsity": what `sparsity_values` returns;
            "dense": the same, with the suffix _dense, of the code without its selection;
            "cknna"; "orthogonality" (of the decoder);
            "monosemanticity": its mean, max and number of live latents;
            "recovery": concepts_found, auroc, ... with the prefixes patch_, object_ and image_, and
            the same of random directions, an untrained SAE and a probe.
            None: all whose needs (an image encoder, ground truth, ...) are met.
        image_encoder: for MonoSemanticity: a name (`encoders.image_encoder`), or a callable
            (images uint8 [B, 3, S, S], indices [B]) -> [B, e]; or several: the numbers of all but
            the first have a suffix (`encoders.judge`).
        pooling: of token codes to image codes (`pool_codes`).
        k: neighbours of CKNNA.
        threshold: the AUROC from which a latent counts as good for a concept.
        seed: of the samples, and of the random directions and untrained SAEs beside them.
        sample_tokens: that CKNNA compares, at most.
        sample_images: that recovery compares, at most.
        device: moves the models there; None: where `clip` is.
        limit_images: that many images only, evenly spaced over the classes (both splits).
        progress: called with (done, total, what): images, over the passes known so far, then what
            CKNNA and recovery compare.

    Raises:
        ValueError: an unknown protocol, ranking, setting, metric or pooling; a metric that lacks
            what it needs; n or another size below 1; a missing or superfluous `count_dataset`;
            SAEs of different tokens; thresholds for SAEs that are not there; labels beyond the
            classifier; no images; nothing asked.
    """
    place = place_of(saes)
    of = place.get("of", "all")
    names = check_metrics(
        clip,
        dataset,
        metrics=metrics,
        image_encoder=image_encoder,
        pooling=pooling,
        classifier=classifier is not None,
        tokens=of,
    )
    indices = order = evenly_spaced(dataset.labels, limit_images)
    settings = () if classifier is None else tuple(settings)
    classes = 0 if classifier is None else len(classifier)
    counted: list[int] = []
    thresholds = dict.fromkeys(saes, 0.0)
    if settings:
        check_topn_options(ns, protocol, settings, ranking)
        thresholds = _thresholds(saes, count_threshold)
        if (protocol == "heldout") != (count_dataset is not None):
            raise ValueError(
                f"protocol={protocol!r} with count_dataset={count_dataset!r}: heldout counts on "
                "another split, given as count_dataset; paper counts on the evaluated one"
            )
        order = _by_class(dataset, indices, classes)
        if counts_first(protocol, ranking, settings):
            if count_dataset is None:
                counted, count_dataset = order, dataset
            else:
                counted = evenly_spaced(count_dataset.labels, limit_images)
                counted = _by_class(count_dataset, counted, classes)
    elif not names:
        raise ValueError("nothing to evaluate: give a classifier and settings, or metrics")

    if settings and count_share is not None and not 0 < count_share <= 1:
        raise ValueError(
            f"count_share={count_share}: expected a share of the active codes above 0 and at most "
            "1, or None for count_threshold"
        )

    needs = {need for name in names for need in METRICS[name].needs}
    device = clip.device if device is None else torch.device(device)
    encoders = [
        encoder_by_name(one, dataset) if isinstance(one, str) else one
        for one in (_several(image_encoder) if "embeddings" in needs else ())
    ]
    encoder, judges = (encoders[0] if encoders else None), encoders[1:]
    for module in (clip, *saes.values(), *encoders):
        if isinstance(module, nn.Module):
            module.to(device)
    stream = Stream(
        clip,
        dataset,
        indices,
        encoder=encoder,
        judges=judges,
        classifier=None if classifier is None else classifier.to(device),
        pooling=pooling,
        keep_scores="scores" in needs,
        batch_size=batch_size,
        num_workers=num_workers,
        seed=seed,
        **place,
    )
    concepts = tuple(patch_concept_names(dataset)) if has_patch_truth(dataset) else ()
    options = Options(
        len(indices),
        len(range(clip.tokens)[clip.token_slice(of)]),
        stream.embed_dim,
        k=k,
        threshold=threshold,
        seed=seed,
        sample_tokens=sample_tokens,
        sample_images=sample_images,
        concepts=concepts,
        grid=clip.grid,
        pooling=pooling,
        judges=tuple((_suffix(one), stream.width_of(one)) for one in judges),
    )
    of_count = dataset if count_dataset is None else count_dataset
    count_stream = replace(stream, dataset=of_count, keep_scores=False)
    if count_share is not None and set(settings) - {"no_sae"}:
        thresholds = _thresholds_of_share(count_stream, saes, counted or order, count_share)
    measured = {
        name: [METRICS[metric](sae, options).to(device) for metric in names]
        for name, sae in saes.items()
    }
    predictions = Predictions(len(dataset.labels))
    topn = {
        name: TopN(
            name,
            sae,
            stream,
            predictions,
            ns=ns,
            settings=settings,
            count_threshold=thresholds[name],
            ranking=ranking,
            counting=not counted,
            memory=memory_gb * 2**30 / len(saes),
        )
        for name, sae in saes.items()
        if set(settings) - {"no_sae"}
    }

    done, total, seen = 0, len(counted) + len(order), 0

    def advance(images: Images) -> None:
        nonlocal done
        done += len(images)
        if progress is not None:
            progress(done, total, "images")

    def update(name: str, batch: Batch) -> None:
        for consumer in (*([topn[name]] if topn else []), *measured[name]):
            consumer.update(batch)

    def evaluated(images: Images) -> None:
        nonlocal seen
        seen += len(images)
        if "no_sae" in settings:
            predictions[NO_SAE][images.indices] = images.predictions.cpu()
        advance(images)

    if counted:
        count_stream.run(saes, lambda name, batch: topn[name].count(batch), counted, each=advance)
        for one in topn.values():
            one.rank()
    stream.run(saes, update, order, each=evaluated)
    for one in topn.values():
        one.close()
    if not seen:
        raise ValueError("none of the dataset's images could be read")
    if postponed := set().union(*(one.postponed for one in topn.values())):
        total += len(postponed)
        again = [index for index in order if index in postponed]
        stream.run(saes, lambda name, batch: topn[name].update(batch), again, each=advance)
        for one in topn.values():
            one.close()

    numbers: list[dict[str, Any]] = []
    for name, several in measured.items():
        for metric, one in zip(names, several, strict=True):
            if progress is not None:
                one.progress = progress
            values = one.compute()
            if undeclared := sorted(values.keys() - {number.key for number in one.numbers}):
                raise ValueError(
                    f"metric {metric!r} computes {undeclared[0]!r}, which its class lacks among "
                    "its `numbers`: no report would show it"
                )
            numbers += [{"sae": name, "metric": m, "value": float(v)} for m, v in values.items()]
    keys = [NO_SAE, *(key for one in topn.values() for key in one.keys)]
    found = {key: predictions[key] for key in keys if key in predictions}
    labels = torch.as_tensor(dataset.labels)
    by_class = {key: per_class_accuracy(found[key], labels, classes) for key in found}
    counts = [one.images for one in topn.values()]
    return Evaluation(
        rows=make_rows(found, by_class, labels, list(topn), protocol, ranking) if found else [],
        class_accuracy=by_class,
        predictions=found,
        labels=labels,
        latents={name: one.latents.cpu() for name, one in topn.items()},
        counted_images=counts[0] if counts else torch.zeros(0, dtype=torch.long),
        count_threshold={name: one.count_threshold for name, one in topn.items()},
        share_above_threshold={name: one.share_above_threshold for name, one in topn.items()},
        metrics=numbers,
        per_latent={
            name: {key: value.cpu() for one in several for key, value in one.per_latent.items()}
            for name, several in measured.items()
        },
        concepts={
            name: [row for one in several for row in one.concepts]
            for name, several in measured.items()
        },
        images=seen,
        pooling=pooling,
        image_encoder=None if encoder is None else getattr(encoder, "name", repr(encoder)),
    )


def check_metrics(
    clip: FrozenCLIP,
    dataset: Any,
    *,
    metrics: Sequence[str] | None = None,
    image_encoder: str | Encoder | Sequence[str | Encoder] | None = None,
    pooling: str = "mean",
    classifier: bool = False,
    tokens: str = "all",
) -> list[str]:
    """The metrics that `evaluate` will compute with these options, for checks before slow work.

    Args:
        classifier: whether there is one.
        tokens: which of an image's the SAEs are of.

    Raises:
        ValueError: see `evaluate`.
    """
    if pooling not in POOLINGS:
        raise ValueError(f"pooling={pooling!r}: expected one of {', '.join(POOLINGS)}")
    if pooling == "cls" and not clip.prefix_tokens:
        raise ValueError(f"pooling='cls': {clip.name} has no class token; use mean or max")
    if pooling == "cls" and tokens == "patches":
        raise ValueError("pooling='cls': an SAE of patches has no code of it; use mean or max")
    suffixes = [_suffix(one) for one in _several(image_encoder)[1:]]
    if twice := [one for one in suffixes if suffixes.count(one) > 1]:
        raise ValueError(
            f"image_encoder: several encoders after the first are named {twice[0]!r} in the "
            "results: expected one of each kind"
        )
    there = {
        "embeddings": bool(_several(image_encoder)),
        "truth": has_truth(dataset),
        "patch_truth": has_patch_truth(dataset),
        "captions": clip.has_captions and captions_differ(dataset),
        "patches": clip.has_patches and tokens != "cls",
        "predictions": classifier,
    }
    chosen = []
    for metric in METRICS if metrics is None else metrics:
        absent = [need for need in METRICS[metric].needs if not there.get(need, True)]
        if absent and metrics is not None:
            raise ValueError(f"metrics: {metric!r} needs {NEEDS[absent[0]]}")
        if not absent:
            chosen.append(metric)
    return chosen


def _several(image_encoder: str | Encoder | Sequence[str | Encoder] | None) -> list[str | Encoder]:
    if image_encoder is None:
        return []
    if isinstance(image_encoder, str) or not isinstance(image_encoder, Sequence):
        return [image_encoder]
    return list(image_encoder)


def _suffix(encoder: str | Encoder) -> str:
    return judge(encoder if isinstance(encoder, str) else str(getattr(encoder, "name", "")))


def _thresholds(saes: Mapping[str, SAE], given: float | Mapping[str, float]) -> dict[str, float]:
    if not isinstance(given, Mapping):
        given = dict.fromkeys(saes, given)
    if set(given) != set(saes):
        raise ValueError(
            f"count_threshold for {sorted(given)}: expected one for each SAE, {sorted(saes)}"
        )
    for name, value in given.items():
        if not value >= 0:
            raise ValueError(
                f"count_threshold={value} for {name}: expected at least 0, or latents that are "
                "not active would count"
            )
    return {name: float(given[name]) for name in saes}


def _thresholds_of_share(
    stream: Stream, saes: Mapping[str, SAE], images: Sequence[int], share: float
) -> dict[str, float]:
    """The threshold that a share of each SAE's active codes exceeds, on images of all classes."""
    few = images[:: -(-len(images) // SHARE_IMAGES)]
    active: dict[str, list[Tensor]] = {name: [] for name in saes}

    def add(name: str, batch: Batch) -> None:
        values = batch.sparse.values.float()
        active[name].append(values[values != 0].cpu())

    stream.run(saes, add, few)
    found = {}
    for name, parts in active.items():
        values = torch.cat(parts).sort(descending=True).values
        exceeding = int(share * len(values))
        # The largest code that does not exceed it; all active codes exceed 0.
        found[name] = float(values[exceeding].clamp(min=0)) if exceeding < len(values) else 0.0
    return found


def _by_class(dataset: Any, indices: list[int], classes: int) -> list[int]:
    """Images class by class, in their own order within a class."""
    labels = torch.as_tensor(dataset.labels)
    if labels.min() < 0 or labels.max() >= classes:
        raise ValueError(
            f"labels from {int(labels.min())} to {int(labels.max())} with a classifier of "
            f"{classes} classes: expected 0..{classes - 1}"
        )
    chosen = torch.tensor(indices)
    return chosen[labels[chosen].argsort(stable=True)].tolist()

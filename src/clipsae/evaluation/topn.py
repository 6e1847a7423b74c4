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

B images, T tokens of an image, d width, e embedding size, M latents, C classes, n latents kept.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from clipsae.clip import FrozenCLIP
from clipsae.data.loader import image_batches
from clipsae.evaluation.numbers import SETTINGS
from clipsae.evaluation.passes import evenly_spaced, in_eval_mode
from clipsae.evaluation.result import NO_SAE, TopNResult, make_rows, per_class_accuracy
from clipsae.evaluation.single import Predictions, SingleSAE
from clipsae.sae import SAE

PROTOCOLS = ("paper", "heldout")

Progress = Callable[[int, int], None]


@torch.no_grad()
def evaluate_topn(
    clip: FrozenCLIP,
    saes: Mapping[str, SAE],
    dataset: Any,
    classifier: Tensor,
    *,
    ns: Sequence[int] = (1, 5, 10, 50),
    protocol: str = "paper",
    count_dataset: Any = None,
    count_threshold: float | Mapping[str, float] = 0.2,
    settings: Sequence[str] = tuple(SETTINGS),
    batch_size: int = 32,
    num_workers: int = 0,
    device: torch.device | str | None = None,
    limit_images: int | None = None,
    memory_gb: float = 4.0,
    sparsity: bool = False,
    progress: Progress | None = None,
) -> TopNResult:
    """Evaluate SAEs of one layer of one CLIP on one dataset, all on the same stream of images.

    Args:
        saes: by name; each has its own M and reads tokens of `clip.prefix`.
        dataset: the evaluated split: `labels` LongTensor [N], items (uint8 [3, S, S], label).
        classifier: [C, e], a row per class index, of unit length or not (then longer rows win).
        ns: how many latents are kept; M is added for `on` and `off`.
        protocol: "paper" counts on the evaluated split itself, which is the published number;
            "heldout" counts on `count_dataset`.
        count_threshold: a (token, latent) pair counts if its code is larger; one for all SAEs or
            one for each by name. 0.2 was tuned for codes of unnormalised tokens.
        settings: which of no_sae, on, off, self.
        device: moves the models there; None: where `clip` is.
        limit_images: that many images only, evenly spaced over the classes (both splits).
        memory_gb: bound on what waits for its class to be complete. The images of a class that
            needs more are encoded a second time instead, with the same results.
        sparsity: also collect the corpus metrics of `SparsityMetrics` on the evaluated split.
        progress: called with (images done, images in all), over the passes known so far.

    Raises:
        ValueError: an unknown protocol or setting, n < 1, a missing or superfluous
            `count_dataset`, thresholds for SAEs that are not there, labels beyond the classifier,
            no images.
    """
    thresholds = _thresholds(saes, count_threshold)
    check_topn_options(ns, protocol, settings)
    if (protocol == "heldout") != (count_dataset is not None):
        raise ValueError(
            f"protocol={protocol!r} with count_dataset={count_dataset!r}: heldout counts on "
            "another split, given as count_dataset; paper counts on the evaluated one"
        )
    device = clip.device if device is None else torch.device(device)
    clip.to(device)
    classes = len(classifier)
    indices = _by_class(dataset, limit_images, classes)
    counted = [] if count_dataset is None else _by_class(count_dataset, limit_images, classes)
    predictions = Predictions(clip, classifier.to(device), len(dataset.labels))
    runs = [
        SingleSAE(
            name,
            sae.to(device),
            predictions,
            ns=ns,
            settings=settings,
            count_threshold=thresholds[name],
            batch_size=batch_size,
            memory=memory_gb * 2**30 / len(saes),
            sparsity=sparsity,
        )
        for name, sae in saes.items()
        if set(settings) - {"no_sae"}
    ]

    done = total = 0

    def batches(source: Any, of: list[int]) -> Iterator[tuple[Tensor, list[int], Tensor]]:
        nonlocal done, total
        total += len(of)
        for images, labels, found in image_batches(source, batch_size, num_workers, of):
            yield clip.prefix(clip.normalize(images)), labels.tolist(), found
            done += len(found)
            if progress is not None:
                progress(done, total)

    with in_eval_mode(saes.values()):
        if protocol == "heldout" and runs:
            for tokens, labels, _ in batches(count_dataset, counted):
                for run in runs:
                    run.count(tokens, labels)
            for run in runs:
                run.pass_is_over()
        for tokens, labels, found in batches(dataset, indices):
            if "no_sae" in settings:
                predictions.add(NO_SAE, tokens, found)
            for run in runs:
                run.evaluate(tokens, labels, found, counting=protocol == "paper")
        for run in runs:
            run.pass_is_over()
        again = {index for run in runs for index in run.postponed}
        if again:
            for tokens, labels, found in batches(dataset, [i for i in indices if i in again]):
                for run in runs:
                    run.evaluate_ranked(tokens, labels, found)
    return _result(predictions, runs, torch.as_tensor(dataset.labels), settings, protocol)


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


def check_topn_options(ns: Sequence[int], protocol: str, settings: Sequence[str]) -> None:
    """Refuse what `evaluate_topn` would, without anything else at hand.

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


def _by_class(dataset: Any, limit: int | None, classes: int) -> list[int]:
    """Indices of the images to visit, class by class, in their own order within a class."""
    labels = torch.as_tensor(dataset.labels)
    if not len(labels):
        raise ValueError("the dataset has no images: expected at least one")
    if labels.min() < 0 or labels.max() >= classes:
        raise ValueError(
            f"labels from {int(labels.min())} to {int(labels.max())} with a classifier of "
            f"{classes} classes: expected 0..{classes - 1}"
        )
    chosen = torch.tensor(evenly_spaced(labels, limit))
    return chosen[labels[chosen].argsort(stable=True)].tolist()


def _result(
    predictions: Predictions,
    runs: list[SingleSAE],
    labels: Tensor,
    settings: Sequence[str],
    protocol: str,
) -> TopNResult:
    keys = [NO_SAE] if "no_sae" in settings else []
    keys += [key for run in runs for key in run.keys]
    found = {key: predictions.of(key) for key in keys}
    by_class = {
        key: per_class_accuracy(found[key], labels, len(predictions.classifier)) for key in keys
    }
    diagnostics = {run.name: run.diagnostics() for run in runs}
    return TopNResult(
        rows=make_rows(found, by_class, labels, [run.name for run in runs], protocol),
        class_accuracy=by_class,
        predictions=found,
        labels=labels,
        latents={run.name: run.rankings.latents.cpu() for run in runs},
        counted_images=runs[0].rankings.images if runs else torch.zeros(0, dtype=torch.long),
        count_threshold={run.name: run.count_threshold for run in runs},
        share_above_threshold={name: share for name, (share, _) in diagnostics.items()},
        l0={name: l0 for name, (_, l0) in diagnostics.items()},
        sparsity={run.name: run.sparsity_values() for run in runs if run.sparsity is not None},
    )

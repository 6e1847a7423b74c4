"""The frozen result of a top-n evaluation, and the accuracies in it.

N images of the split, C classes, M latents, n latents kept.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

# (sae, setting, n), such as ("topk", "on", 5).
Key = tuple[str | None, str, int | None]
NO_SAE: Key = (None, "no_sae", None)


@dataclass(frozen=True)
class TopNResult:
    """What `evaluate_topn` found.

    Attributes:
        rows: tidy, one dict a setting: sae, protocol, setting ("no_sae", "on", "off", "self"),
            n (None for no_sae), accuracy (macro, %), micro_accuracy (%), images, classes (those
            with images), competing (those that could be predicted). `no_sae` is repeated for each
            SAE.
        class_accuracy: per key the accuracy of each class in %, [C]; NaN without images.
        predictions: per key the predicted class of each image, LongTensor [N]; -1: not evaluated.
        labels: LongTensor [N], of the evaluated split.
        latents: per SAE the ranked latents of each class, LongTensor [C, n].
        counted_images: LongTensor [C], images that a class's ranking rests on; where it is 0, the
            ranking is the first n latents and means nothing.
        share_above_threshold: per SAE, the share of active (token, latent) pairs of the counting
            split whose code exceeds the count threshold.
        count_threshold: per SAE.
        l0: per SAE, the mean number of active latents of a token of the evaluated split.
        sparsity: per SAE the corpus metrics of `SparsityMetrics`, where they were asked for.
    """

    rows: list[dict[str, Any]]
    class_accuracy: dict[Key, Tensor]
    predictions: dict[Key, Tensor]
    labels: Tensor
    latents: dict[str, Tensor]
    counted_images: Tensor
    share_above_threshold: dict[str, float]
    count_threshold: dict[str, float]
    l0: dict[str, float]
    sparsity: dict[str, dict[str, float]] = field(default_factory=dict)

    @property
    def diagnostics(self) -> dict[str, dict[str, Any]]:
        """Per SAE the numbers beside the accuracies, as plain Python values."""
        return {
            name: {
                "count_threshold": threshold,
                "share_above_threshold": self.share_above_threshold[name],
                "l0": self.l0[name],
                "sparsity": self.sparsity.get(name),
            }
            for name, threshold in self.count_threshold.items()
        }


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
    saes: list[str],
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

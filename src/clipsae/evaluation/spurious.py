"""Latents of what a classifier should not rely on are taken out: what its worst group wins.

A class is tied to a confounder in the training images (a bird to its background), and the accuracy
of the worst group of class and confounder says how far a classifier relies on it. As in SHIFT
(Marks et al., "Sparse Feature Circuits", ICLR 2025, arXiv 2403.19647, section 4) latents of the
confounder are taken out of the model, here out of the token stream, after which CLIP's remaining
blocks run as they are.

N images, C classes, A values of the confounder, G = C A groups, M latents, e embedding size, V
sets of latents.
"""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn

from clipsae.clip import FrozenCLIP
from clipsae.evaluation.interventions import Versions, changed_images
from clipsae.evaluation.metrics.auroc import auroc, latent_blocks
from clipsae.sae import SAE, SparseCodes

_STEPS = 2000  # of the solver at most
_PAIRS, _LATENTS = 2**22, 2**12  # of a block of the AUROC
_NORMAL = 1.96


@dataclass(frozen=True)
class GroupAccuracy:
    """Shares of images that are classified rightly, 0..1.

    Attributes:
        average: of all images.
        worst: of the group with the smallest, among those with images.
        low, high: its 95 % interval (Wilson 1927). That it is the smallest of G by chance is not
            in it.
        group: which it is.
    """

    average: float
    worst: float
    low: float
    high: float
    group: int


def group_accuracy(predictions: Tensor, labels: Tensor, groups: Tensor) -> GroupAccuracy:
    """Average and worst-group accuracy.

    Args:
        predictions: LongTensor [N].
        labels: LongTensor [N].
        groups: LongTensor [N], 0..G - 1.
    """
    right = (predictions == labels).double()
    sizes = groups.bincount().double()
    shares = groups.bincount(right) / sizes
    group = int(shares.nan_to_num(nan=torch.inf).argmin())
    share, n, z = float(shares[group]), float(sizes[group]), _NORMAL
    middle = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    reach = z / (1 + z**2 / n) * (share * (1 - share) / n + z**2 / (4 * n**2)) ** 0.5
    return GroupAccuracy(float(right.mean()), share, middle - reach, middle + reach, group)


def confounder_auroc(codes: SparseCodes, groups: Tensor, values: int) -> Tensor:
    """How well each latent tells each value of the confounder, whatever the class.

    Args:
        codes: [N, M], of images.
        groups: LongTensor [N], class * A + value.
        values: A.

    Returns:
        float64 [M, A]: the AUROC among the images of one class, mean over the classes that have
        images with the value and without. A latent of the class alone has 0.5, however the class is
        tied to the confounder.

    Raises:
        ValueError: no class has images of two values.
    """
    label, value = groups // values, groups % values
    found: list[Tensor] = []
    for c in label.unique().tolist():
        rows = label == c
        truth = nn.functional.one_hot(value[rows], values).double()
        blocks = latent_blocks(codes[rows], _PAIRS, _LATENTS)
        found.append(torch.cat([auroc(block, truth) for _, block in blocks]))
    scores = torch.stack(found).nanmean(dim=0)
    if bool(scores.isnan().all()):
        raise ValueError(
            "in no class is there more than one value of the confounder, so that no latent can be "
            "chosen by labels: choose latents by name"
        )
    return scores


class Probe:
    """Logistic regression (scikit-learn's, C = 1) on embeddings, which are standardised by the
    mean of each dimension and one deviation of the images that it is fitted on.

    Args:
        embeddings: [N, e].
        labels: LongTensor [N].
        groups: LongTensor [N]: each group then has the same weight; None: each image.
    """

    def __init__(self, embeddings: Tensor, labels: Tensor, groups: Tensor | None = None) -> None:
        self.mean = embeddings.mean(dim=0)
        self.deviation = (embeddings - self.mean).square().mean().sqrt().clamp(min=1e-12)
        weights = None
        if groups is not None:
            sizes = groups.bincount()
            weights = (len(groups) / (int((sizes > 0).sum()) * sizes[groups])).numpy()
        self.regression = LogisticRegression(max_iter=_STEPS)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            self.regression.fit(self._standardised(embeddings), labels.numpy(), weights)

    def predict(self, embeddings: Tensor) -> Tensor:
        """[N, e] -> LongTensor [N]."""
        return torch.from_numpy(self.regression.predict(self._standardised(embeddings)))

    def _standardised(self, embeddings: Tensor) -> Any:
        return ((embeddings - self.mean) / self.deviation).numpy()


def confounder_directions(embeddings: Tensor, groups: Tensor, values: int) -> Tensor:
    """The directions in which the confounder's values differ, whatever the class.

    Args:
        embeddings: [N, e].
        groups: LongTensor [N], class * A + value.
        values: A.

    Returns:
        Orthonormal rows [A - 1, e]: a basis of the differences of the values' means within a class,
        averaged over the classes that have images of all values.

    Raises:
        ValueError: no class has images of all values.
    """
    x, parts = embeddings.double(), []
    for c in (groups // values).unique().tolist():
        of_values = [x[groups == c * values + a] for a in range(values)]
        if all(map(len, of_values)):
            means = torch.stack([part.mean(dim=0) for part in of_values])
            parts.append(means[1:] - means[:1])
    if not parts:
        raise ValueError(
            "no class has training images of every value of the confounder: a projection cannot be "
            "computed from its labels"
        )
    return torch.linalg.qr(torch.stack(parts).mean(dim=0).T).Q.T.to(embeddings.dtype)


def projected(embeddings: Tensor, directions: Tensor) -> Tensor:
    """Embeddings [N, e] without what lies in orthonormal directions [r, e]."""
    return embeddings - (embeddings @ directions.T) @ directions


@torch.no_grad()
def embeddings_without(
    clip: FrozenCLIP,
    sae: SAE,
    dataset: Any,
    sets: Sequence[Sequence[int]],
    indices: Sequence[int],
    *,
    batch_size: int = 32,
    num_workers: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[Tensor, Tensor]:
    """Embeddings of images when each set of latents is taken out of their tokens, in one pass.

    Args:
        sae: of `clip`'s layer; moved to its device.
        sets: V of them; an empty one leaves the tokens as they are.
        indices: N images of the dataset.
        progress: called with (images done, N).

    Returns:
        float32 [V, N', e] of unit length, on the CPU, and the images, LongTensor [N']: those that
        could be read.
    """
    versions = Versions.of(sae.to(clip.device), sets)
    found, read = [], []
    reading = {"batch_size": batch_size, "num_workers": num_workers}
    for one in changed_images(clip, sae, dataset, versions, indices, **reading):
        embeddings = one.before.repeat(len(sets), 1)
        embeddings[one.versions] = one.after
        found.append(nn.functional.normalize(embeddings.float(), dim=-1).cpu())
        read.append(one.index)
        progress(len(read), len(indices))
    if not found:
        raise ValueError("none of the dataset's images could be read")
    return torch.stack(found, dim=1), torch.tensor(read)

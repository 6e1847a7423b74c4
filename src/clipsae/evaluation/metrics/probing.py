"""Probing: how much of what is known of an image can be read from few latents, and from all.

Sparse probing as in Gurnee et al., "Finding Neurons in a Haystack" (2023), by the rules of
visaebench (https://github.com/vraj130/visaebench, 0.1.0, `sparse_probing_auc` and
`downstream_preservation`): latents are ranked by ANOVA's F,

    F = (sum_c n_c (mean_c - mean)^2 / (C - 1)) / (sum_c sum_{i: c} (x_i - mean_c)^2 / (N - C)),

and a logistic regression (scikit-learn's, C = 1) on the first k predicts the class.

N images, M latents, C classes, d width.
"""

import warnings
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from clipsae.evaluation.metrics.base import METRICS, Measurement, Options
from clipsae.evaluation.metrics.sample import CodeSample, Draw
from clipsae.evaluation.numbers import Number
from clipsae.evaluation.passes import Batch, pool_codes
from clipsae.evaluation.ranking import top_latents
from clipsae.sae import SAE, SparseCodes

KS = (1, 5, 10, 20, 50, 100)
# Attributes of images with one object that are probed, where the dataset knows them.
ATTRIBUTES = ("shape", "colour", "pattern", "size", "position", "background")

_ENTRIES = 2**24  # codes that are not zero
_STEPS = 500, 1000  # of the solver at most, for codes and for tokens
_SUMS = 2**24  # numbers of the classes' sums [C, m] of a block of latents


def anova_f(codes: SparseCodes, labels: Tensor) -> Tensor:
    """ANOVA's F of each latent's code by class, as scikit-learn's `f_classif`.

    Args:
        codes: [N, M].
        labels: LongTensor [N], class indices from 0.

    Returns:
        float64 [M]: NaN for codes that are constant, infinity for those that are constant within
        each class and differ between classes; NaN throughout with fewer than two classes, or with
        as many images as classes.
    """
    labels = labels.unique(return_inverse=True)[1]
    sizes = labels.bincount().double()
    n, classes = len(labels), len(sizes)
    if classes < 2 or n <= classes:
        return codes.values.new_full((codes.latents,), torch.nan, dtype=torch.float64)
    codes = codes.by_latent()
    edges, step, parts = codes.latent_edges().tolist(), max(1, _SUMS // classes), []
    for first in range(0, codes.latents, step):
        m = min(step, codes.latents - first)
        block = slice(edges[first], edges[first + m])
        x, latent = codes.values[block].double(), codes.latent[block].long() - first
        label = labels[codes.token[block].long()]
        sums = x.new_zeros(classes, m).index_put_((label, latent), x, accumulate=True)
        means = sums / sizes[:, None]
        # Deviations from the classes' means, and not differences of sums of squares, which are
        # never exactly 0: of the pairs, and of the zeros of each class.
        within = x.new_zeros(m).index_add_(0, latent, (x - means[label, latent]).square())
        pairs = x.new_zeros(classes, m).index_put_(
            (label, latent), torch.ones_like(x), accumulate=True
        )
        within += ((sizes[:, None] - pairs) * means.square()).sum(dim=0)
        mean = sums.sum(dim=0) / n
        between = (sizes[:, None] * (means - mean).square()).sum(dim=0)
        # What rounding leaves of a constant is none of its variation.
        square = x.new_zeros(m).index_add_(0, latent, x.square())
        within, between = (torch.where(v > 1e-14 * square, v, 0) for v in (within, between))
        parts.append((between / (classes - 1)) / (within / (n - classes)))
    return torch.cat(parts)


def sparse_probing(
    codes: SparseCodes,
    labels: Tensor,
    training: Tensor,
    *,
    ranking: Tensor | None = None,
    ks: Sequence[int] = KS,
    standardize: bool = True,
) -> dict[str, Any]:
    """Accuracy of logistic regressions on the k latents with the largest F.

    Args:
        codes: [N, M], of images.
        labels: LongTensor [N].
        training: BoolTensor [N], the rows that the regressions are fitted on; they are scored on
            the others.
        ranking: BoolTensor [N], the rows that latents are ranked on; None: those of `training`.
            visaebench ranks on all, the scored ones, too.
        ks: those above M are left out.
        standardize: divide codes by their deviation on the `training` rows. Without it, as in
            visaebench, the penalty on the weights depends on how large codes are.

    Returns:
        `k_accuracies`, {k: accuracy}; `auc`, the area under accuracy as a function of k (by
        trapezoids), divided by the range of k; `latents`, LongTensor [max k], ranked, the first of
        equals first. NaN where the training rows have fewer than two classes or no row is scored.

    Raises:
        ValueError: shapes that do not fit, or no k that is at least 1 and at most M.
    """
    ks = sorted(k for k in ks if k <= codes.latents)
    if not ks or ks[0] < 1:
        raise ValueError(f"ks={list(ks)} with {codes.latents} latents: expected some of 1..M")
    ranking = training if ranking is None else ranking
    for name, rows in (("labels", labels), ("training", training), ("ranking", ranking)):
        if rows.shape != (codes.tokens,):
            raise ValueError(f"{name} {tuple(rows.shape)}: expected [{codes.tokens}], one a row")
    scores = anova_f(codes[ranking], labels[ranking])
    ranked = top_latents(scores.nan_to_num(nan=-torch.inf, posinf=torch.inf)[None], ks[-1])[0]
    x = codes.lookup(ranked).float()
    if standardize and training.sum() > 1:
        deviation = x[training].std(dim=0)
        x = x / torch.where(deviation > 0, deviation, 1)
    accuracies = {k: _accuracy(x[:, :k], labels, training, _STEPS[0])[0] for k in ks}
    values = list(accuracies.values())
    area = sum((values[i] + values[i + 1]) / 2 * (ks[i + 1] - ks[i]) for i in range(len(ks) - 1))
    auc = area / (ks[-1] - ks[0]) if len(ks) > 1 else values[0]
    return {"k_accuracies": accuracies, "auc": auc, "latents": ranked}


def linear_probe(x: Tensor, x_hat: Tensor, labels: Tensor, training: Tensor) -> tuple[float, float]:
    """Accuracy of a logistic regression on tokens, and of the same one on reconstructions.

    Args:
        x: [N, d], means over an image's tokens. The penalty on the weights depends on their scale:
            visaebench standardises tokens first.
        x_hat: [N, d], means over its reconstructions.
        labels: LongTensor [N].
        training: BoolTensor [N], the rows of x that it is fitted on; it is scored on the others.

    Returns:
        The two accuracies; NaN where the training rows have fewer than two classes or no row is
        scored.

    Raises:
        ValueError: shapes that do not fit.
    """
    if x.ndim != 2 or x.shape != x_hat.shape or not len(x) == len(labels) == len(training):
        raise ValueError(
            f"x {tuple(x.shape)}, x_hat {tuple(x_hat.shape)}, labels {tuple(labels.shape)}, "
            f"training {tuple(training.shape)}: expected [N, d] twice and [N] twice"
        )
    original, reconstructed = _accuracy(x, labels, training, _STEPS[1], x_hat)
    return original, reconstructed


def _accuracy(
    x: Tensor, labels: Tensor, training: Tensor, steps: int, other: Tensor | None = None
) -> tuple[float, float]:
    """Of a probe of the training rows, on the other rows of x, and on those of `other`."""
    fitted = labels[training]
    if len(fitted.unique()) < 2 or bool(training.all()):
        return torch.nan, torch.nan
    probe = LogisticRegression(solver="lbfgs", max_iter=steps, C=1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        probe.fit(x[training].cpu().numpy(), fitted.cpu().numpy())
    truth = labels[~training].cpu().numpy()
    of_x, of_other = (
        float(probe.score(y[~training].cpu().numpy(), truth))
        for y in (x, x if other is None else other)
    )
    return of_x, of_other


def halves(labels: Tensor, order: Tensor) -> Tensor:
    """Two halves of the images with as many of each class, as far as that goes.

    Args:
        labels: LongTensor [N].
        order: LongTensor [N], a random permutation.

    Returns:
        BoolTensor [N], the half to fit on, which has the odd one of a class.
    """
    by_class = order[labels[order].argsort(stable=True)]
    sorted_labels = labels[by_class]
    starts = torch.searchsorted(sorted_labels, sorted_labels)
    training = torch.zeros(len(labels), dtype=torch.bool, device=labels.device)
    training[by_class] = (torch.arange(len(labels), device=labels.device) - starts) % 2 == 0
    return training


class _Images(Measurement):
    """A sample of images: labels beside what a subclass keeps of each.

    Where the dataset knows objects, images with one object have its attributes as labels, too.
    """

    def __init__(self, sae: SAE, options: Options) -> None:
        super().__init__(sae, options)
        self.draw = Draw(options.images, 1, options.sample_images, options.seed)

    def _sample(self, metric: str, latents: int, columns: int) -> CodeSample:
        beside = torch.empty(0, 1 + len(ATTRIBUTES) + columns, dtype=torch.float64)
        return CodeSample(metric, "images", latents, beside, lambda rows, pairs: pairs > _ENTRIES)

    def _labels(self, batch: Batch, rows: Tensor) -> Tensor:
        """[n, 1 + attributes], -1: not known."""
        labels = batch.labels[rows].double()[:, None]
        known = batch.object_labels(ATTRIBUTES)
        if known is None:
            known = torch.full((len(batch.labels), len(ATTRIBUTES)), -1)
        return torch.cat((labels, known[rows].double()), dim=1).to(batch.tokens.device)

    def _order(self, n: int) -> Tensor:
        generator = torch.Generator().manual_seed(self.options.seed)
        return torch.randperm(n, generator=generator)

    def _tasks(self, beside: Tensor) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
        """What is probed where there are two labels or more, "" for the classes and the
        attributes by name: the rows as a mask, their labels and the half to fit on."""
        tasks = {}
        for at, name in enumerate(("", *ATTRIBUTES)):
            rows = beside[:, at] >= 0
            labels = beside[rows, at].long()
            if len(labels.unique()) > 1:
                order = self._order(len(labels)).to(labels.device)
                tasks[name] = rows, labels, halves(labels, order)
        return tasks


def _scalar(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def _mean(values: Sequence[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64).nanmean()


_number = partial(Number, table="probing", format=".1%")


@METRICS.register("sparse_probing")
class SparseProbing(_Images):
    """`sparse_probing` of the pooled codes of a sample of images, for the classes and, where the
    dataset knows objects, for the attributes of images with one object; beside it the same of an
    untrained SAE of the same config, initialised from 32 images of the pass.

    The halves have as many images of each class.
    """

    numbers = (
        _number(
            "sparse_probing_auc",
            "sparse probing",
            "accuracy of logistic regressions on the k pooled latents of largest ANOVA F, fitted "
            "on one half of the images and scored on the other; mean over k from 1 to 100, or to "
            "the largest of 1, 5, 10, 20, 50, 100 that is at most M (area under the curve)",
            floor="sparse_probing_auc_untrained",
            ceiling="accuracy_original",
            headline=True,
        ),
        *(
            _number(
                f"sparse_probing_k{k}",
                f"sparse probing, k = {k}",
                floor=f"sparse_probing_k{k}_untrained",
                ceiling="accuracy_original",
            )
            for k in KS
        ),
        _number(
            "concept_probing_auc",
            "sparse probing of concepts",
            "the same for the attributes of images with one object, mean over attributes",
            floor="concept_probing_auc_untrained",
            ceiling="concept_accuracy_original",
        ),
        *(
            _number(
                f"concept_probing_{name}",
                f"sparse probing of {name}",
                floor=f"concept_probing_{name}_untrained",
                ceiling=f"concept_accuracy_original_{name}",
            )
            for name in ATTRIBUTES
        ),
    )
    numbers += tuple(
        Number(f"{n.key}_untrained", f"{n.label} (untrained)", n.meaning, n.format, table="")
        for n in numbers
    )

    def __init__(self, sae: SAE, options: Options) -> None:
        super().__init__(sae, options)
        self.trained = self._sample("sparse_probing", self.latents, 0)
        self.untrained = self._sample("sparse_probing (untrained)", self.latents, 0)

    def update(self, batch: Batch) -> None:
        rows, numbers = self.draw.among(batch.positions)
        if not len(rows):
            return
        labels = self._labels(batch, rows)
        self.trained.update(numbers, labels, SparseCodes.from_dense(batch.pooled[rows]))
        codes = batch.floors["untrained"].encode_sparse(batch.tokens[rows].float())
        pooled = pool_codes(codes.dense(), self.options.pooling)
        self.untrained.update(numbers, labels, SparseCodes.from_dense(pooled))

    def compute(self) -> dict[str, Tensor]:
        """The numbers; those of attributes where they are known."""
        found: dict[str, Tensor] = {}
        for suffix, sample in (("", self.trained), ("_untrained", self.untrained)):
            beside, codes = sample.compute()
            of_attributes = {}
            tasks = self._tasks(beside)
            for at, (name, (rows, labels, training)) in enumerate(tasks.items()):
                probed = sparse_probing(codes[rows], labels, training)
                if name:
                    of_attributes[name] = probed["auc"]
                else:
                    found[f"sparse_probing_auc{suffix}"] = _scalar(probed["auc"])
                    for k, accuracy in probed["k_accuracies"].items():
                        found[f"sparse_probing_k{k}{suffix}"] = _scalar(accuracy)
                self.progress(at + 1, len(tasks), "sparse probing")
            if of_attributes:
                found[f"concept_probing_auc{suffix}"] = _mean(list(of_attributes.values()))
                for name, value in of_attributes.items():
                    found[f"concept_probing_{name}{suffix}"] = _scalar(value)
        return found


@METRICS.register("linear_probe")
class LinearProbe(_Images):
    """`linear_probe` of the mean tokens of a sample of images and of their reconstructions, with
    the halves of `SparseProbing`: the ceiling of sparse probing, and what the SAE loses.

    Tokens and reconstructions are standardised as visaebench does it, by the mean of each dimension
    and one deviation, here of the fitted images' mean tokens.
    """

    numbers = (
        _number(
            "downstream_preservation",
            "linear probe kept",
            "accuracy on reconstructions over that on tokens, of one logistic regression on tokens "
            "(mean over an image)",
            format=".3f",
        ),
        _number("accuracy_original", "linear probe of tokens"),
        _number("accuracy_reconstructed", "linear probe of reconstructions"),
        _number("accuracy_gap", "linear probe, lost", better="min"),
        _number("concept_accuracy_original", "linear probe of tokens, concepts"),
        _number("concept_accuracy_reconstructed", "linear probe of reconstructions, concepts"),
        *(
            _number(
                f"concept_accuracy_original_{name}", f"linear probe of tokens, {name}", table=""
            )
            for name in ATTRIBUTES
        ),
    )

    def __init__(self, sae: SAE, options: Options) -> None:
        super().__init__(sae, options)
        self.sample = self._sample("linear_probe", 1, 2 * self.d)

    def update(self, batch: Batch) -> None:
        rows, numbers = self.draw.among(batch.positions)
        if not len(rows):
            return
        means = [x[rows].double().mean(dim=1) for x in (batch.targets, batch.reconstruction)]
        beside = torch.cat((self._labels(batch, rows), *means), dim=1)
        nothing = SparseCodes.from_dense(beside.new_zeros(len(rows), 1))
        self.sample.update(numbers, beside, nothing)

    def compute(self) -> dict[str, Tensor]:
        """The numbers; those of attributes where they are known."""
        beside, _ = self.sample.compute()
        x, x_hat = beside[:, 1 + len(ATTRIBUTES) :].split(self.d, dim=1)
        found: dict[str, Tensor] = {}
        both: dict[str, tuple[float, float]] = {}
        for name, (rows, labels, training) in self._tasks(beside).items():
            fitted = x[rows][training]
            mean = fitted.mean(dim=0)
            deviation = (fitted - mean).square().mean().sqrt().clamp(min=1e-12)
            of_x, of_x_hat = ((y[rows] - mean) / deviation for y in (x, x_hat))
            both[name] = linear_probe(of_x, of_x_hat, labels, training)
            if name:
                found[f"concept_accuracy_original_{name}"] = _scalar(both[name][0])
        if "" in both:
            original, reconstructed = both.pop("")
            ratio = reconstructed / original if original else torch.nan
            found |= {
                "downstream_preservation": _scalar(min(ratio, 2.0)),
                "accuracy_original": _scalar(original),
                "accuracy_reconstructed": _scalar(reconstructed),
                "accuracy_gap": _scalar(original - reconstructed),
            }
        if both:
            means = zip(*both.values(), strict=True)
            for name, values in zip(("original", "reconstructed"), means, strict=True):
                found[f"concept_accuracy_{name}"] = _mean(values)
        return found

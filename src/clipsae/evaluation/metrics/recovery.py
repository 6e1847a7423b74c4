"""Concept recovery: which of the concepts that are known to be there did the SAE find?

Where ground truth exists (`clipsae.evaluation.truth`), each concept, such as
"colour=red", asks: is there one latent that tells where it is? And each latent: does it stand for
one concept? The questions follow the field: is a concept split over several latents (Bricken et
al., "Towards Monosemanticity", 2023), are several concepts merged in one latent?

N rows (patches or images), M latents, V concepts.
"""

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn

from clipsae.evaluation.metrics.auroc import auroc, best_f1, latent_blocks, sum_rows
from clipsae.evaluation.metrics.base import METRICS, Measurement, Options
from clipsae.evaluation.metrics.rows import Progress, Sample, SampledCodes
from clipsae.evaluation.numbers import Number
from clipsae.evaluation.passes import Batch
from clipsae.evaluation.truth import IMAGE_ATTRIBUTES, PATCH_ATTRIBUTES, concept_names
from clipsae.sae import SAE, SparseCodes

_CONCEPTS = (
    Number(
        "concepts_found",
        "concepts found",
        "share of the known concepts that a single latent detects, by an AUROC of "
        "measurement.threshold (0.9 unless set) or above",
        ".1%",
    ),
    Number("auroc", "AUROC", "of a concept's best latent, mean over concepts"),
    Number("f1", "F1", "of a concept's best latent, mean over concepts"),
    Number(
        "purity",
        "purity",
        "largest share of a latent's activation on one concept, mean over latents",
    ),
    Number("splitting", "splitting", "good latents per concept that is found", better=""),
    Number(
        "merging", "merging", "share of good latents that are good for several concepts", better=""
    ),
)
NUMBERS = tuple(
    replace(
        number,
        key=f"{level}_{number.key}",
        label=f"{number.label}, {level}",
        table="recovery",
        headline=(level, number.key) == ("patch", "concepts_found"),
    )
    for level in ("patch", "image")
    for number in _CONCEPTS
)
# Scalars of `concept_recovery` and what they are called after "patch_" and "image_".
SCALARS = {
    "concepts_found": "concepts_found",
    "mean_auroc": "auroc",
    "mean_f1": "f1",
    "mean_purity": "purity",
    "splitting": "splitting",
    "merging": "merging",
}
# Of each concept, in `concepts.csv`.
COLUMNS = ("positives", "auroc", "auroc_latent", "f1", "f1_latent", "latents")

# Of float64 arrays [entries, V] and [m, V]: so few that their memory is used again and again.
_BLOCK_ELEMENTS = 2**20
# Codes that are not zero: 0.2 GB, and ten times that while they are sorted.
_ENTRIES = 2**24


def concept_recovery(
    codes: Tensor | SparseCodes,
    truth: Tensor,
    threshold: float = 0.9,
    progress: Progress | None = None,
) -> dict[str, Tensor]:
    """Compare all latents with all concepts on a sample; exact, ties included.

    Best latents are chosen, and thresholds of F1 set, on the same rows that are scored: with few
    rows of a concept and many latents this flatters, as chance finds a latent that fits.

    Args:
        codes: [N, M], dense or sparse.
        truth: BoolTensor [N, V].
        threshold: the AUROC from which a latent counts as good for a concept.
        progress: called with (latents done, M).

    Returns:
        Per concept [V]:
        `auroc`, `auroc_latent`: the best single latent's, and which (the first of equals);
        `f1`, `f1_latent`: the same for the best F1 (`best_f1`);
        `latents`: how many latents are good for it (above 1: split);
        `positives`: rows that have it. Concepts that all rows have or none are NaN, latent -1.

        Per latent [M]:
        `concepts`: how many concepts it is good for (above 1: it swallows several);
        `purity`: the largest share of its activation (positive codes) that lies on rows of one
        concept, `purest` which; NaN and -1 for latents without positive codes. A latent that is
        active everywhere has the share of the commonest concept, max(positives) / N.

        Over the concepts that are defined, resp. live latents, scalars:
        `mean_auroc`, `mean_f1`, `mean_purity`; `concepts_found`: share of concepts with a good
        latent; `splitting`: mean number of good latents of a concept that is found; `merging`:
        share of good latents that are good for two concepts or more; `live`: latents with positive
        codes.

    Raises:
        ValueError: shapes that do not fit, or a threshold outside 0.5..1.
    """
    if isinstance(codes, Tensor):
        codes = SparseCodes.from_dense(codes.float())
    if truth.ndim != 2 or truth.dtype != torch.bool or len(truth) != len(codes):
        raise ValueError(
            f"truth {truth.dtype} {tuple(truth.shape)} with {len(codes)} rows of codes: expected "
            f"bool [{len(codes)}, V]"
        )
    if not 0.5 < threshold <= 1:
        raise ValueError(f"threshold={threshold}: expected an AUROC above 0.5 and at most 1")
    positives = truth.sum(dim=0)
    truth = truth.double()
    v = truth.shape[1]
    best = {"auroc": _Best(v, truth), "f1": _Best(v, truth)}
    latents = torch.zeros_like(positives)
    per_latent = []
    room = max(1, _BLOCK_ELEMENTS // max(v, 1))
    for first, block in latent_blocks(codes, pairs=room, latents=room):
        score = auroc(block, truth)
        best["auroc"].add(first, score)
        best["f1"].add(first, best_f1(block, truth))
        good = score >= threshold
        latents += good.sum(dim=0)
        per_latent.append((good.sum(dim=1), *_purity(block, truth)))
        if progress is not None:
            progress(first + block.latents, codes.latents)
    concepts, purity, purest = (torch.cat(parts) for parts in zip(*per_latent, strict=True))

    defined = (positives > 0) & (positives < len(truth))
    found = {"positives": positives, "latents": latents, "concepts": concepts}
    found |= {"purity": purity, "purest": purest}
    for name, of in best.items():
        found[name] = torch.where(defined, of.value, torch.nan)
        found[f"{name}_latent"] = torch.where(defined, of.latent, -1)
    recovered = (latents > 0)[defined].double()
    return found | {
        "mean_auroc": found["auroc"].nanmean(),
        "mean_f1": found["f1"].nanmean(),
        "mean_purity": purity.nanmean(),
        "concepts_found": recovered.mean(),
        "splitting": latents[latents > 0].double().mean(),
        "merging": (concepts[concepts > 0] > 1).double().mean(),
        "live": (~purity.isnan()).sum(),
    }


class _InImages(SampledCodes):
    """`concept_recovery` of a sample of images, by their pooled codes."""

    level, what, attributes = "image", "images", IMAGE_ATTRIBUTES

    def __init__(self, sae: SAE, options: Options) -> None:
        names = concept_names(self.attributes)
        super().__init__(sae, options, len(names), torch.bool)
        self.names = names
        self.sample = Sample(options.images, 1, options.sample_images, options.seed)

    def too_much(self, rows: int, entries: int) -> bool:
        return entries > _ENTRIES

    def update(self, batch: Batch) -> None:
        rows, numbers = self.sample.among(batch.positions)
        if rows:
            at = torch.tensor(numbers, device=batch.pooled.device)
            self._add(at, batch.image_truth[rows], batch.pooled[rows])

    def compute(self) -> dict[str, Tensor]:
        _, truth, codes = self._rows()
        self._note(codes)
        found = concept_recovery(codes, truth, self.options.threshold, self._told)
        columns = {name: found[name].tolist() for name in COLUMNS}
        self.concepts = [
            {"level": self.level, "concept": name, **{c: of[v] for c, of in columns.items()}}
            for v, name in enumerate(self.names)
        ]
        values = {f"{self.level}_{name}": found[key] for key, name in SCALARS.items()}
        if self.compared is not None:
            values[f"{self.level}_compared"] = torch.tensor(float(self.compared))
        return values

    def _told(self, done: int, total: int) -> None:
        if self.progress is not None:
            self.progress(done, total, f"recovery in {self.what}")


class _InPatches(_InImages):
    """The same by the images' patches."""

    level, what, attributes = "patch", "patches", PATCH_ATTRIBUTES

    def update(self, batch: Batch) -> None:
        rows, numbers = self.sample.among(batch.positions)
        if rows:
            truth = batch.patch_truth[rows]
            codes, patches = batch.codes[rows, -truth.shape[1] :], torch.arange(truth.shape[1])
            of_patches = torch.tensor(numbers)[:, None] * len(patches) + patches
            at = of_patches.flatten().to(codes.device)
            self._add(at, truth.flatten(0, 1), codes.flatten(0, 1))


@METRICS.register("recovery")
class ConceptRecovery(Measurement):
    """`concept_recovery` of a sample of images, by their patches and by their pooled codes.

    It keeps the sample's codes. Of SAEs with very many active latents a row it keeps a part
    (`SampledCodes`), and logs how many. `concepts` has each concept's best latents.
    """

    numbers = NUMBERS
    needs = ("truth",)

    def __init__(self, sae: SAE, options: Options) -> None:
        super().__init__(sae, options)
        self.levels = nn.ModuleList([_InPatches(sae, options), _InImages(sae, options)])

    def update(self, batch: Batch) -> None:
        """Add those of the images that are in the sample."""
        for level in self._levels():
            level.update(batch)

    def compute(self) -> dict[str, Tensor]:
        """The scalars of both levels, after "patch_" and "image_"."""
        found: dict[str, Tensor] = {}
        self.concepts = []
        for level in self._levels():
            level.progress = self.progress
            found |= level.compute()
            self.concepts += level.concepts
        return found

    def _levels(self) -> Iterator[_InImages]:
        for level in self.levels:
            assert isinstance(level, _InImages)
            yield level


class _Best:
    """The largest value of each column over blocks of rows, and in which row it was first."""

    def __init__(self, columns: int, like: Tensor) -> None:
        self.value = like.new_full((columns,), -torch.inf)
        self.latent = torch.full((columns,), -1, device=like.device)

    def add(self, first: int, block: Tensor) -> None:
        value, row = block.nan_to_num(nan=-torch.inf).max(dim=0)
        better = value > self.value
        self.value = torch.where(better, value, self.value)
        self.latent = torch.where(better, row + first, self.latent)


def _purity(block: SparseCodes, truth: Tensor) -> tuple[Tensor, Tensor]:
    activation = block.values.double().clamp(min=0)
    mass = block.sum_tokens(activation)
    shares = sum_rows(block, activation, truth) / mass[:, None]
    purity, purest = shares.max(dim=1)
    live = mass > 0
    return torch.where(live, purity, torch.nan), torch.where(live, purest, -1)

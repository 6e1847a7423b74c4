"""Concept recovery: which of the concepts that are known to be there did the SAE find?

Where ground truth exists (`clipsae.evaluation.truth`), each concept, such as
"colour=red", asks: is there one latent that tells where it is? And each latent: does it stand for
one concept? The questions follow the field: is a concept split over several latents (Bricken et
al., "Towards Monosemanticity", 2023), are several concepts merged in one latent?

N rows (patches or images), M latents, V concepts.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from clipsae.evaluation.metrics.auroc import auroc, best_f1, latent_blocks, sum_rows
from clipsae.evaluation.metrics.base import METRICS, Measurement, Options
from clipsae.evaluation.metrics.sample import CodeSample, Draw
from clipsae.evaluation.numbers import Number
from clipsae.evaluation.passes import Batch
from clipsae.evaluation.ranking import top_latents
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
    progress: Callable[[int, int], None] = lambda done, total: None,
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
        `concepts`: how many concepts it is good for (above 1: it merges several);
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
    room = max(1, _BLOCK_ELEMENTS // max(truth.shape[1], 1))
    parts = []
    for first, block in latent_blocks(codes, pairs=room, latents=room):
        parts.append((auroc(block, truth), best_f1(block, truth), *_purity(block, truth)))
        progress(first + block.latents, codes.latents)
    area, f1, purity, purest = (torch.cat(part) for part in zip(*parts, strict=True))

    good = area >= threshold
    latents, concepts = good.sum(dim=0), good.sum(dim=1)
    found = {"positives": positives, "latents": latents, "concepts": concepts}
    found |= {"purity": purity, "purest": purest}
    defined = (positives > 0) & (positives < len(truth))
    for name, scores in (("auroc", area), ("f1", f1)):
        best = top_latents(scores.nan_to_num(nan=-torch.inf).T.contiguous(), 1)
        value = scores.T.gather(1, best).squeeze(1)
        found[name] = torch.where(defined, value, torch.nan)
        found[f"{name}_latent"] = torch.where(defined, best.squeeze(1), -1)
    return found | {
        "mean_auroc": found["auroc"].nanmean(),
        "mean_f1": found["f1"].nanmean(),
        "mean_purity": purity.nanmean(),
        "concepts_found": (latents > 0)[defined].double().mean(),
        "splitting": latents[latents > 0].double().mean(),
        "merging": (concepts[concepts > 0] > 1).double().mean(),
        "live": (~purity.isnan()).sum(),
    }


def _purity(block: SparseCodes, truth: Tensor) -> tuple[Tensor, Tensor]:
    activation = block.values.double().clamp(min=0)
    mass = block.sum_tokens(activation)
    shares = sum_rows(block, activation, truth) / mass[:, None]
    purity, purest = shares.max(dim=1)
    live = mass > 0
    return torch.where(live, purity, torch.nan), torch.where(live, purest, -1)


@METRICS.register("recovery")
class ConceptRecovery(Measurement):
    """`concept_recovery` of a sample of images, by their patches and by their pooled codes.

    The sample's codes are kept; of SAEs with very many active latents a part of them
    (`CodeSample`), and the log says how many. `concepts` has each concept's best latents.
    """

    numbers = NUMBERS
    needs = ("truth",)

    def __init__(self, sae: SAE, options: Options) -> None:
        super().__init__(sae, options)
        self.draw = Draw(options.images, 1, options.sample_images, options.seed)
        self.patches, self.images = (
            CodeSample(
                "recovery",
                unit,
                self.latents,
                torch.empty(0, len(concept_names(attributes)), dtype=torch.bool),
                lambda rows, pairs: pairs > _ENTRIES,
            )
            for unit, attributes in (("patches", PATCH_ATTRIBUTES), ("images", IMAGE_ATTRIBUTES))
        )

    def update(self, batch: Batch) -> None:
        rows, numbers = self.draw.among(batch.positions)
        if not len(rows):
            return
        truth = batch.patch_truth[rows]
        patches = truth.shape[1]
        drawn = torch.zeros(batch.tokens.shape[:2], dtype=torch.bool)
        drawn[rows, -patches:] = True
        codes = batch.sparse.view(-1, self.latents)[drawn.flatten().to(truth.device)]
        of_patches = numbers[:, None] * patches + torch.arange(patches)
        self.patches.update(of_patches.flatten(), truth.flatten(0, 1), codes)
        pooled = SparseCodes.from_dense(batch.pooled[rows])
        self.images.update(numbers, batch.image_truth[rows], pooled)

    def compute(self) -> dict[str, Tensor]:
        """The scalars of both levels, after "patch_" and "image_"."""
        values: dict[str, Tensor] = {}
        self.concepts = []
        for level, sample, attributes in (
            ("patch", self.patches, PATCH_ATTRIBUTES),
            ("image", self.images, IMAGE_ATTRIBUTES),
        ):

            def report(done: int, total: int, unit: str = sample.unit) -> None:
                self.progress(done, total, f"recovery in {unit}")

            truth, codes = sample.compute()
            found = concept_recovery(codes, truth, self.options.threshold, report)
            columns = {name: found[name].tolist() for name in COLUMNS}
            self.concepts += [
                {"level": level, "concept": name, **{c: column[v] for c, column in columns.items()}}
                for v, name in enumerate(concept_names(attributes))
            ]
            for number in _CONCEPTS:
                value = found.get(f"mean_{number.key}", found[number.key])
                values[f"{level}_{number.key}"] = value
            if sample.compared is not None:
                values[f"{level}_compared"] = torch.tensor(float(sample.compared))
        return values

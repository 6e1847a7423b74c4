"""Concept recovery: which of the concepts that are known to be there did the SAE find?

Where ground truth exists (`clipsae.evaluation.truth`), each concept, such as "colour=red", asks:
is there one latent that tells where it is? A concept is compared with its siblings, the other
values of its attribute, on the rows that have the attribute at all: red with the other colours, on
patches of objects. (Against all patches, of which most show background, whatever tells objects from
the background would seem to tell red: 512 random directions find three concepts of four so.) And
what is chosen, the latent and the threshold of its F1, is chosen on one half of the images and
scored on the other.

The questions follow the field: is a concept split over several latents (Bricken et al., "Towards
Monosemanticity", 2023), are several merged in one, is one absorbed (Chanin et al., "A is for
Absorption", 2024, arXiv 2409.14507)? Beside each answer stands what random directions and an
untrained SAE reach on the same images, and what a supervised probe does.

N rows (patches, objects or images), M latents, V concepts, d width.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from clipsae.evaluation.metrics.auroc import (
    auroc,
    best_f1,
    column_correlation,
    correlation,
    f1_above,
    f1_threshold,
    latent_blocks,
)
from clipsae.evaluation.metrics.base import METRICS, Measurement, Options
from clipsae.evaluation.metrics.sample import CodeSample, Draw
from clipsae.evaluation.numbers import Number
from clipsae.evaluation.passes import Batch
from clipsae.evaluation.ranking import top_latents
from clipsae.evaluation.truth import IMAGE_ATTRIBUTES, PATCH_ATTRIBUTES, concept_names
from clipsae.sae import SAE, SparseCodes

LEVELS = ("patch", "object", "image")
_ATTRIBUTES = dict(zip(LEVELS, (PATCH_ATTRIBUTES, OBJECT_ATTRIBUTES, IMAGE_ATTRIBUTES), strict=True))
# What they are compared with: `{level}_{key}_{name}`.
REFERENCES = {
    "random": "512 random directions and their negatives",
    "untrained": "an SAE of the same config before its first step",
    "probe": "a linear probe of each concept, fitted by least squares",
}
_SCORES = (
    Number(
        "concepts_found",
        "concepts found",
        "share of the known concepts that a single latent tells from their siblings (red from the "
        "other colours, on what has a colour at all), by an AUROC of measurement.threshold (0.9 "
        "unless set) or above; latents are chosen on one half of the images and scored on the "
        "other",
        ".1%",
    ),
    Number("auroc", "AUROC", "of a concept's latent among siblings, mean over concepts"),
    Number(
        "f1",
        "F1",
        "of a concept's latent among siblings, its threshold chosen on the other half, mean over "
        "concepts",
    ),
    Number(
        "mcc",
        "MCC",
        "correlation of a concept with its latent among siblings, latents assigned one to one, "
        "mean over concepts",
    ),
)
_COUNTS = (
    Number("splitting", "splitting", "good latents per concept that is found", better=""),
    Number(
        "merging", "merging", "share of good latents that are good for several concepts", better=""
    ),
    Number("concepts", "concepts", "that both halves show, and not everywhere", ".0f", ""),
)
_PURITY = Number(
    "purity", "purity", "largest share of a latent's activation on one concept, mean over latents"
)


def _numbers(level: str) -> tuple[Number, ...]:
    scores = [
        replace(
            number,
            headline=number.key == "concepts_found",
            floor=f"{level}_{number.key}_untrained",
            ceiling=f"{level}_{number.key}_probe",
        )
        for number in _SCORES
    ]
    own = [*scores, *_COUNTS, *([] if level == "object" else [_PURITY])]
    beside = [
        replace(n, key=f"{n.key}_{of}", label=f"{n.label} ({of})", meaning=said, table="")
        for n in _SCORES
        for of, said in REFERENCES.items()
    ]
    return tuple(
        replace(
            n,
            key=f"{level}_{n.key}",
            label=f"{n.label}, {level}",
            table="recovery" if n in own else "",
        )
        for n in (*own, *beside)
    )


NUMBERS = tuple(number for level in LEVELS for number in _numbers(level))
# Of each concept, in `concepts.csv`.
SIZES = ("choosing", "scoring", "choosing_positives", "scoring_positives")
COLUMNS = (
    *SIZES,
    *("auroc", "auroc_latent", "f1", "f1_latent", "f1_threshold", "mcc", "mcc_latent", "latents"),
)

# Of float64 arrays [entries, V] and [m, V]: so few that their memory is used again and again.
_BLOCK_ELEMENTS = 2**20
# Codes that are not zero: 0.2 GB, and several times that while they are sorted.
_ENTRIES = 2**24
# Tokens and truth, float32: 0.13 GB.
_NUMBERS = 2**25
# Images whose tokens are encoded again at a time, by what is no SAE in the evaluation.
_IMAGES = 32


def concept_recovery(
    codes: Tensor | SparseCodes,
    truth: Tensor,
    names: Sequence[str],
    choosing: Tensor,
    threshold: float = 0.9,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Tensor]:
    """Compare all latents with all concepts among their siblings; exact, ties included.

    The rows of a concept "attribute=value" are those that have any value of the attribute; of
    these, the rows of `choosing` choose the latent, and the others score it. Rows of one image
    should be in the same half, as they are alike.

    Args:
        codes: [N, M], dense or sparse.
        truth: BoolTensor [N, V].
        names: of the V concepts, "attribute=value".
        choosing: BoolTensor [N], the half that chooses.
        threshold: the AUROC from which a latent counts as good for a concept.
        progress: called with (latents done, all), for each set of rows.

    Returns:
        Per concept [V]:
        `auroc`, `auroc_latent`: of the latent with the largest AUROC in the choosing half (the
        first of equals) the AUROC in the other half;
        `f1`, `f1_latent`, `f1_threshold`: of the latent with the largest F1 (`best_f1`), and that
        threshold, the F1 of "code >= threshold" in the other half;
        `mcc`, `mcc_latent`: Pearson's correlation, over the concept's rows, of the code of its
        latent with being the concept (1 or 0), where latents are assigned to concepts one to one
        so that the sum of these correlations is largest in the choosing half (Hungarian
        algorithm; as Hyvarinen and Morioka 2016 score sources, but signed: a latent stands for
        what it is active on). 0 for a concept that is left without a latent;
        `latents`: how many latents are good for it (above 1: split): the AUROC is at least the
        threshold in both halves, or it is the chosen one, and is that in the other half;
        `choosing`, `scoring`: rows with the attribute in either half, `choosing_positives`,
        `scoring_positives`: those that show the concept.
        A concept that all rows of a half show, or none, is NaN, its latents are -1.

        Per latent [M]:
        `concepts`: how many concepts it is good for (above 1: it merges several);
        `purity`: the largest share of its activation (positive codes, of all N rows) that lies on
        rows of one concept; NaN for latents without positive codes. A latent that is active
        everywhere has the share of the commonest concept.

        Scalars: `mean_auroc`, `mean_f1`, `mean_mcc` over the concepts that are defined, and their
        number `defined`; `concepts_found`: the share of these whose `auroc` is at least the
        threshold; `splitting`: mean number of good latents of a concept that is found; `merging`:
        share of good latents that are good for two concepts or more; `mean_purity` over latents;
        `live`: latents with positive codes.

    Raises:
        ValueError: shapes that do not fit, or a threshold outside 0.5..1.
    """
    if isinstance(codes, Tensor):
        codes = SparseCodes.from_dense(codes.float())
    _check(len(codes), truth, names, choosing, threshold)
    v, total = truth.shape[1], codes.latents
    double = {"dtype": torch.float64, "device": truth.device}
    area, f1, r = (torch.full((total, v), torch.nan, **double) for _ in range(3))
    groups = siblings(truth, names)
    for number, (rows, columns) in enumerate(groups):
        part = codes[rows & choosing]
        here = truth[rows & choosing][:, columns].double()
        room = max(1, _BLOCK_ELEMENTS // len(columns))
        for first, block in latent_blocks(part, pairs=room, latents=room):
            to = torch.arange(first, first + block.latents, device=here.device)[:, None]
            area[to, columns] = auroc(block, here)
            f1[to, columns] = best_f1(block, here)
            r[to, columns] = correlation(block, here)
            progress(number * total + first + block.latents, len(groups) * total)

    sizes = _sizes(truth, groups, choosing)
    found = {name: sizes[at] for at, name in enumerate(SIZES)}
    defined = ((sizes[2:] > 0) & (sizes[2:] < sizes[:2])).all(dim=0)
    best = [top_latents(x.nan_to_num(nan=-torch.inf).T.contiguous(), 1)[:, 0] for x in (area, f1)]
    assigned = _one_to_one(r[:, defined])
    partner = torch.full_like(best[0], -1)
    partner[defined] = assigned
    likely = (area >= threshold) & defined
    likely[best[0][defined], defined.nonzero()[:, 0]] = True
    good = torch.zeros_like(likely)
    scores = {name: torch.full((v,), torch.nan, **double) for name in ("auroc", "f1", "mcc")}
    level = torch.full((v,), torch.nan, **double)
    for rows, columns in groups:
        columns = columns[defined[columns]]
        if not len(columns):
            continue
        here = truth[rows & ~choosing][:, columns]
        before, after = codes[rows & choosing], codes[rows & ~choosing]
        candidates = likely[:, columns].any(dim=1).nonzero()[:, 0]
        of_candidates = SparseCodes.from_dense(after.lookup(candidates)).by_latent()
        again = auroc(of_candidates, here.double())  # [candidates, columns]
        good[candidates[:, None], columns] = again >= threshold
        at = torch.searchsorted(candidates, best[0][columns])
        scores["auroc"][columns] = again[at, torch.arange(len(columns), device=at.device)]
        chosen = best[1][columns]
        level[columns] = f1_threshold(
            before.lookup(chosen), truth[rows & choosing][:, columns]
        )
        scores["f1"][columns] = f1_above(after.lookup(chosen), here, level[columns])
        values = after.lookup(partner[columns].clamp(min=0))
        scores["mcc"][columns] = torch.where(
            partner[columns] >= 0, column_correlation(values, here), 0
        )
    good &= likely
    latents, concepts = good.sum(dim=0), good.sum(dim=1)
    purity = _purity(codes, truth)
    found |= scores | {"latents": latents, "concepts": concepts, "purity": purity}
    found |= {"f1_threshold": level, "mcc_latent": partner}
    for name, latent in zip(("auroc", "f1"), best, strict=True):
        found[f"{name}_latent"] = torch.where(defined, latent, -1)
    return found | {
        "mean_auroc": scores["auroc"].nanmean(),
        "mean_f1": scores["f1"].nanmean(),
        "mean_mcc": scores["mcc"].nanmean(),
        "mean_purity": purity.nanmean(),
        "defined": defined.sum(),
        "concepts_found": (scores["auroc"] >= threshold)[defined].double().mean(),
        "splitting": latents[latents > 0].double().mean(),
        "merging": (concepts[concepts > 0] > 1).double().mean(),
        "live": (~purity.isnan()).sum(),
    }


def siblings(truth: Tensor, names: Sequence[str]) -> list[tuple[Tensor, Tensor]]:
    """The rows on which concepts are compared: those with any value of the concept's attribute.

    Args:
        truth: BoolTensor [N, V].
        names: of the V concepts, "attribute=value".

    Returns:
        Rows, BoolTensor [N], and columns, LongTensor, of the concepts that are compared on them.
        Attributes that the same rows have are together.
    """
    columns: dict[str, list[int]] = {}
    for at, name in enumerate(names):
        columns.setdefault(name.partition("=")[0], []).append(at)
    groups: list[tuple[Tensor, list[int]]] = []
    for several in columns.values():
        rows = truth[:, several].any(dim=1)
        same = [known for mask, known in groups if torch.equal(mask, rows)]
        if same:
            same[0].extend(several)
        else:
            groups.append((rows, several))
    return [(rows, torch.tensor(several, device=truth.device)) for rows, several in groups]


def _check(
    rows: int, truth: Tensor, names: Sequence[str], choosing: Tensor, threshold: float
) -> None:
    if truth.ndim != 2 or truth.dtype != torch.bool or len(truth) != rows:
        raise ValueError(
            f"truth {truth.dtype} {tuple(truth.shape)} with {rows} rows of codes: expected "
            f"bool [{rows}, V]"
        )
    if len(names) != truth.shape[1]:
        raise ValueError(f"{len(names)} names: expected one for each of {truth.shape[1]} concepts")
    if choosing.shape != (rows,) or choosing.dtype != torch.bool:
        raise ValueError(
            f"choosing {choosing.dtype} {tuple(choosing.shape)}: expected bool [{rows}]"
        )
    if not 0.5 < threshold <= 1:
        raise ValueError(f"threshold={threshold}: expected an AUROC above 0.5 and at most 1")


def _sizes(truth: Tensor, groups: list[tuple[Tensor, Tensor]], choosing: Tensor) -> Tensor:
    """LongTensor [4, V] of `SIZES`."""
    sizes = torch.zeros(4, truth.shape[1], dtype=torch.long, device=truth.device)
    for rows, columns in groups:
        for at, half in enumerate((rows & choosing, rows & ~choosing)):
            sizes[at, columns] = half.sum()
            sizes[2 + at, columns] = truth[half][:, columns].sum(dim=0)
    return sizes


def _one_to_one(r: Tensor) -> Tensor:
    """The latent of each concept, [V] (-1: there were too few), by the correlations [M, V]."""
    latent, concept = linear_sum_assignment(r.cpu().numpy(), maximize=True)
    found = torch.full((r.shape[1],), -1, dtype=torch.long)
    found[torch.from_numpy(concept)] = torch.from_numpy(latent)
    return found.to(r.device)


def _purity(codes: SparseCodes, truth: Tensor) -> Tensor:
    activation = codes.values.double().clamp(min=0)
    mass, most = codes.sum_tokens(activation), torch.zeros(codes.latents, dtype=torch.float64)
    most = most.to(mass.device)
    for column in truth.T.double():
        most = torch.maximum(most, codes.sum_tokens(activation * codes.at_token(column)))
    return torch.where(mass > 0, most / mass, torch.nan)


def pool_rows(codes: SparseCodes, group: Tensor, how: str = "max") -> SparseCodes:
    """The codes of groups of rows, such as an object's patches.

    Args:
        codes: [N, M].
        group: LongTensor [N], which of G groups each row belongs to; -1: to none.
        how: "max", or 0 where all are negative; "mean" over the group's rows.

    Returns:
        [G, M].
    """
    sizes = torch.bincount(group[group >= 0])
    of = group[codes.token]
    step = max(1, _POOLED // codes.latents)
    parts = []
    for first in range(0, len(sizes), step):
        here = (of >= first) & (of < first + step)
        cells = (of[here] - first) * codes.latents + codes.latent[here]
        many = sizes[first : first + step]
        dense = codes.values.new_zeros(len(many) * codes.latents)
        if how == "max":
            dense.scatter_reduce_(0, cells, codes.values[here], "amax")
        else:
            dense.index_add_(0, cells, codes.values[here])
        dense = dense.view(len(many), codes.latents)
        parts.append(dense / many[:, None] if how == "mean" else dense)
    return SparseCodes.from_dense(torch.cat(parts))


class _Sample:
    """The sampled images at all levels.

    Args:
        beside: what `CodeSample` has kept, [n, T (d + V + 1) + W]: tokens, patch truth and object
            of each token, and the image's truth.
        tokens, d: T, d.
        pooling: of codes to image codes.
    """

    def __init__(self, beside: Tensor, tokens: int, d: int, pooling: str) -> None:
        names = {level: concept_names(attributes) for level, attributes in _ATTRIBUTES.items()}
        v, w = len(names["patch"]), len(names["image"])
        parts = beside.split((tokens * d, tokens * v, tokens, w), dim=1)
        self.tokens = parts[0].reshape(-1, tokens, d)
        self.pooling = pooling
        of_tokens = parts[1].reshape(-1, tokens, v) > 0
        self.image = parts[3] > 0
        self.objects = parts[2].long()


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

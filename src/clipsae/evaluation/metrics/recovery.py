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

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

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
    sum_rows,
)
from clipsae.evaluation.metrics.base import METRICS, Measurement, Options
from clipsae.evaluation.metrics.floors import (
    RandomDirections,
    encode_some,
    least_squares,
    mean_rows,
    untrained,
)
from clipsae.evaluation.metrics.sample import CodeSample, Draw
from clipsae.evaluation.numbers import Number
from clipsae.evaluation.passes import Batch
from clipsae.evaluation.ranking import top_latents
from clipsae.evaluation.truth import (
    IMAGE_ATTRIBUTES,
    OBJECT_ATTRIBUTES,
    PATCH_ATTRIBUTES,
    concept_names,
)
from clipsae.sae import SAE, SparseCodes

log = logging.getLogger(__name__)

LEVELS = {"patch": "patches", "object": "objects", "image": "images"}
_ATTRIBUTES = {"patch": PATCH_ATTRIBUTES, "object": OBJECT_ATTRIBUTES, "image": IMAGE_ATTRIBUTES}
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

_PER_CONCEPT = ("auroc", "f1", "mcc")

# Of float64 arrays [entries, V] and [m, V]: so few that their memory is used again and again.
_BLOCK_ELEMENTS = 2**20
# Codes that are not zero: 0.2 GB, and several times that while they are sorted.
_ENTRIES = 2**24
# Tokens and truth, float32: 0.13 GB.
_NUMBERS = 2**25
# Of dense codes of pooled rows: 64 MB.
_POOLED = 2**24


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
        `good_for`: how many concepts it is good for (above 1: it merges several);
        `purity`: the largest share of its activation (positive codes, on all rows of the choosing
        half) that lies on rows of one concept that is defined; NaN for latents without positive
        codes there. A latent that is active everywhere has the share of the commonest concept.

        Scalars: `mean_auroc`, `mean_f1`, `mean_mcc` over the concepts that are defined, and their
        number `concepts`; `concepts_found`: the share of these whose `auroc` is at least the
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
    nothing = truth.new_full((v,), torch.nan, dtype=torch.float64)
    area, f1, r, lies = (nothing.repeat(total, 1) for _ in range(4))
    groups = siblings(truth, names)
    before, after = codes[choosing], codes[~choosing]
    for number, (rows, columns) in enumerate(groups):
        part = before[rows[choosing]]
        here = truth[rows & choosing][:, columns].double()
        room = max(1, _BLOCK_ELEMENTS // len(columns))
        for first, block in latent_blocks(part, pairs=room, latents=room):
            to = torch.arange(first, first + block.latents, device=here.device)[:, None]
            area[to, columns] = auroc(block, here)
            f1[to, columns] = best_f1(block, here)
            r[to, columns] = correlation(block, here)
            lies[to, columns] = sum_rows(block, block.values.double().clamp(min=0), here)
            progress(number * total + first + block.latents, len(groups) * total)
    sizes = _sizes(truth, groups, choosing)
    found = {name: sizes[at] for at, name in enumerate(SIZES)}
    defined = _defined(sizes)
    mass = before.sum_tokens(before.values.double().clamp(min=0))
    most = torch.where(defined, lies, 0).amax(dim=1)
    purity = torch.where(mass > 0, most / mass, torch.nan)
    best = {
        name: top_latents(scores.nan_to_num(nan=-torch.inf).T.contiguous(), 1)[:, 0]
        for name, scores in (("auroc", area), ("f1", f1))
    }
    best["mcc"] = _one_to_one(r, defined)
    scores = {name: nothing.clone() for name in _PER_CONCEPT}
    level = nothing.clone()
    likely = (area >= threshold) & defined
    likely[best["auroc"][defined], defined.nonzero()[:, 0]] = True
    good = torch.zeros_like(likely)
    for rows, columns in groups:
        columns = columns[defined[columns]]
        if not len(columns):
            continue
        first, second = before[rows[choosing]], after[rows[~choosing]]
        was, here = (truth[rows & half][:, columns] for half in (choosing, ~choosing))
        candidates = likely[:, columns].any(dim=1).nonzero()[:, 0]
        for start, block in latent_blocks(
            second.take(candidates), pairs=_BLOCK_ELEMENTS, latents=_BLOCK_ELEMENTS
        ):
            of = candidates[start : start + block.latents, None]
            area[of, columns] = auroc(block, here.double())
        good[candidates[:, None], columns] = area[candidates[:, None], columns] >= threshold
        scores["auroc"][columns] = area[best["auroc"][columns], columns]
        chosen = best["f1"][columns]
        level[columns] = f1_threshold(first.columns(chosen), was)
        scores["f1"][columns] = f1_above(second.columns(chosen), here, level[columns])
        partner = best["mcc"][columns]
        of_partner = column_correlation(second.columns(partner.clamp(min=0)), here)
        scores["mcc"][columns] = torch.where(partner >= 0, of_partner, 0)
    good &= likely
    latents, good_for = good.sum(dim=0), good.sum(dim=1)
    found |= scores | {"latents": latents, "good_for": good_for, "purity": purity}
    found |= {"f1_threshold": level}
    found |= {f"{name}_latent": torch.where(defined, best[name], -1) for name in best}
    return found | {
        **{f"mean_{name}": value.nanmean() for name, value in scores.items()},
        "mean_purity": purity.nanmean(),
        "concepts": defined.sum(),
        "concepts_found": (scores["auroc"] >= threshold)[defined].double().mean(),
        "splitting": latents[latents > 0].double().mean(),
        "merging": (good_for[good_for > 0] > 1).double().mean(),
        "live": (mass > 0).sum(),
    }


def probe_recovery(
    features: Tensor,
    truth: Tensor,
    names: Sequence[str],
    choosing: Tensor,
    threshold: float = 0.9,
) -> dict[str, Tensor]:
    """What a supervised linear probe of each concept reaches, by the rules of `concept_recovery`.

    The probe is fitted among siblings by least squares on the half that chooses latents, and the
    threshold of its F1 is set there; the other half scores it.

    Args:
        features: [N, d].
        truth, names, choosing, threshold: as there.

    Returns:
        `auroc`, `f1`, `mcc` per concept, float64 [V], and the scalars `mean_auroc`, `mean_f1`,
        `mean_mcc`, `concepts_found`, `concepts`, as there; and `weights`, float64 [d + 1, V], the
        intercepts last; NaN for concepts that are not defined.

    Raises:
        ValueError: as there.
    """
    _check(len(features), truth, names, choosing, threshold)
    wide = {"dtype": torch.float64, "device": truth.device}
    found = {
        key: torch.full((truth.shape[1],), torch.nan, **wide) for key in ("auroc", "f1", "mcc")
    }
    weights = torch.full((features.shape[1] + 1, truth.shape[1]), torch.nan, **wide)
    groups = siblings(truth, names)
    defined = _defined(_sizes(truth, groups, choosing))
    for rows, columns in groups:
        columns = columns[defined[columns]]
        if not len(columns):
            continue
        before, after = (
            (features[half].double(), truth[half][:, columns])
            for half in (rows & choosing, rows & ~choosing)
        )
        weights[:, columns] = w = least_squares(*before)
        fitted, scores = (x @ w[:-1] + w[-1] for x, _ in (before, after))
        low = torch.cat((fitted, scores)).amin(dim=0) - 1  # thresholds of F1 are positive
        level = f1_threshold(fitted - low, before[1])
        sparse = SparseCodes.from_dense(scores - low).by_latent()
        found["auroc"][columns] = auroc(sparse, after[1].double()).diagonal()
        found["f1"][columns] = f1_above(scores - low, after[1], level)
        found["mcc"][columns] = column_correlation(scores, after[1])
    return found | {
        **{f"mean_{key}": value.nanmean() for key, value in found.items()},
        "concepts_found": (found["auroc"] >= threshold)[defined].double().mean(),
        "concepts": defined.sum(),
        "weights": weights,
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


def _defined(sizes: Tensor) -> Tensor:
    """BoolTensor [V]: both halves have rows that show the concept, and rows that do not."""
    return ((sizes[2:] > 0) & (sizes[2:] < sizes[:2])).all(dim=0)


def _one_to_one(r: Tensor, defined: Tensor) -> Tensor:
    """The latent of each concept, LongTensor [V], by the correlations [M, V]; -1: there were too
    few, or the concept is not defined."""
    latent, concept = linear_sum_assignment(r[:, defined].cpu().numpy(), maximize=True)
    found = torch.full((r.shape[1],), -1, dtype=torch.long)
    found[defined.cpu().nonzero()[:, 0][torch.from_numpy(concept)]] = torch.from_numpy(latent)
    return found.to(r.device)


def pool_rows(codes: SparseCodes, group: Tensor, how: str) -> SparseCodes:
    """The codes of groups of rows, such as an object's patches.

    Args:
        codes: [N, M].
        group: LongTensor [N], which of G groups each row belongs to, each to be found among them;
            -1: to none.
        how: "max" (0 where all are negative), "mean" over the group's rows, or "cls": its first.

    Returns:
        [G, M].
    """
    sizes = torch.bincount(group[group >= 0])
    if how == "cls":
        first = group.new_full((len(sizes),), len(group))
        rows = torch.arange(len(group), device=group.device)
        first.scatter_reduce_(0, group[group >= 0], rows[group >= 0], "amin")
        return codes[torch.zeros_like(group, dtype=torch.bool).index_fill_(0, first, True)]
    of = group[codes.token]
    step = max(1, _POOLED // codes.latents)
    parts = [codes.values.new_zeros(0, codes.latents)]
    for start in range(0, len(sizes), step):
        here = (of >= start) & (of < start + step)
        cells = (of[here] - start) * codes.latents + codes.latent[here]
        many = sizes[start : start + step]
        dense = codes.values.new_zeros(len(many) * codes.latents)
        if how == "max":
            dense.scatter_reduce_(0, cells, codes.values[here], "amax")
        else:
            dense.index_add_(0, cells, codes.values[here])
        dense = dense.view(len(many), codes.latents)
        parts.append(dense / many[:, None] if how == "mean" else dense)
    return SparseCodes.from_dense(torch.cat(parts))


@dataclass(frozen=True)
class _Level:
    """The rows of a level (patches, objects or images) and what is known of them.

    Attributes:
        names: of the V concepts.
        truth: BoolTensor [N, V].
        choosing: BoolTensor [N].
        row: LongTensor [n T], the row that each token belongs to; -1: to none.
    """

    names: list[str]
    truth: Tensor
    choosing: Tensor
    row: Tensor


def _levels(beside: Tensor, tokens: int, d: int) -> tuple[Tensor, dict[str, _Level]]:
    """The sampled images at all levels.

    Every second image chooses. (The sample is in the order of a draw, not of the dataset, whose
    labels may alternate.)

    Args:
        beside: of n images, [n, T (d + V + 1) + W]: their tokens, each token's concepts and object,
            and the image's concepts.
        tokens, d: T, d.

    Returns:
        Tokens [n, T, d], and the levels by name.
    """
    names = {level: concept_names(attributes) for level, attributes in _ATTRIBUTES.items()}
    n, v = len(beside), len(names["patch"])
    sizes = (tokens * d, tokens * v, tokens, len(names["image"]))
    x, of_tokens, objects, of_images = beside.split(sizes, dim=1)
    truth, slot = of_tokens.reshape(n * tokens, v) > 0, objects.flatten().long()
    image = torch.arange(n, device=beside.device)
    of_token = image.repeat_interleave(tokens)
    patch = truth.any(dim=1)  # the class token has no attributes
    shown = slot >= 0
    cells = of_token * (int(slot.max()) + 1) + slot if n else slot
    found, place = cells[shown].unique(return_inverse=True)
    first = place.new_zeros(len(found)).scatter_(0, place, shown.nonzero()[:, 0])  # any: all agree
    columns = [names["patch"].index(name) for name in names["object"]]
    rows = {
        "patch": (truth[patch], of_token[patch], torch.where(patch, patch.cumsum(0) - 1, -1)),
        "object": (
            truth[first][:, columns],
            of_token[first],
            torch.full_like(slot, -1).masked_scatter(shown, place),
        ),
        "image": (of_images > 0, image, of_token),
    }
    return x.reshape(n, tokens, d), {
        name: _Level(names[name], truth, image % 2 == 0, row)
        for name, (truth, image, row) in rows.items()
    }


@METRICS.register("recovery")
class ConceptRecovery(Measurement):
    """`concept_recovery` of a sample of images: by patches, objects and whole images.

    An object's code is the largest of its patches' codes, an image's is pooled by
    `Options.pooling`. The codes, tokens and truth of the sample are kept; where that is too much
    memory, those of a part of the images (`CodeSample`), and the log says of how many. `concepts`
    has each concept's latents, and its scores by what the SAE is compared with (`REFERENCES`),
    which is measured on the same images; of codes that are mostly not zero on the first of them.
    """

    numbers = NUMBERS
    needs = ("truth",)

    def __init__(self, sae: SAE, options: Options) -> None:
        super().__init__(sae, options)
        self._sae = (sae,)  # in a tuple it is no part of this module
        self.draw = Draw(options.images, 1, options.sample_images, options.seed)
        order = torch.Generator().manual_seed(options.seed)
        self.order = torch.randperm(len(self.draw.drawn), generator=order)
        patch, image = (len(concept_names(_ATTRIBUTES[level])) for level in ("patch", "image"))
        width = options.tokens * (self.d + patch + 1) + image
        self.sample = CodeSample(
            "recovery",
            "images",
            options.tokens * self.latents,
            torch.empty(0, width),
            lambda rows, pairs: pairs > _ENTRIES or rows * width > _NUMBERS,
        )

    def update(self, batch: Batch) -> None:
        rows, numbers = self.draw.among(batch.positions)
        if not len(rows):
            return
        x = batch.tokens[rows].float()
        n, tokens = x.shape[:2]
        known = (
            batch.patch_truth[rows].to(x.device),
            batch.patch_objects[rows, :, None].to(x.device),
        )
        truth, objects = (
            x.new_full((n, tokens, part.shape[2]), nothing)
            for part, nothing in zip(known, (0, -1), strict=True)
        )
        for whole, part in ((truth, known[0]), (objects, known[1])):
            whole[:, -part.shape[1] :] = part.float()  # patches are the last tokens
        parts = (x, truth, objects, batch.image_truth[rows].to(x))
        beside = torch.cat([part.flatten(1) for part in parts], dim=1)
        drawn = torch.zeros(len(batch.positions), dtype=torch.bool, device=x.device)
        drawn[rows] = True
        codes = batch.sparse[drawn]
        flat = SparseCodes(codes.values, codes.positions, (n, tokens * self.latents))
        self.sample.update(self.order[numbers], beside, flat)

    def compute(self) -> dict[str, Tensor]:
        """The scalars of all levels, after "patch_", "object_" and "image_"."""
        beside, kept = self.sample.compute()
        tokens = self.options.tokens
        x, levels = _levels(beside, tokens, self.d)
        codes = SparseCodes(kept.values, kept.positions, (len(x) * tokens, self.latents))
        found = {level: self._compare(level, codes, rows) for level, rows in levels.items()}
        others = {level: {"probe": self._probe(level, x, rows)} for level, rows in levels.items()}
        for of, model in (
            ("random", RandomDirections(x.flatten(0, 1))),
            ("untrained", untrained(self._sae[0], x)),
        ):
            codes = encode_some(model, x, _ENTRIES)
            n = codes.tokens // tokens
            some = levels if n == len(x) else _levels(beside[:n], tokens, self.d)[1]
            for level, rows in some.items():
                others[level][of] = self._compare(level, codes, rows)

        values: dict[str, Tensor] = {}
        self.concepts = []
        for level in LEVELS:
            values |= _named(level, found[level], others[level])
            self.concepts += _rows(level, levels[level].names, found[level], others[level])
        self._tell(values, levels)
        return values

    def _compare(self, level: str, codes: SparseCodes, rows: _Level) -> dict[str, Tensor]:
        """`concept_recovery` of codes [n T, M] at a level."""
        if level == "patch":
            codes = codes[rows.row >= 0]
        else:
            codes = pool_rows(codes, rows.row, "max" if level == "object" else self.options.pooling)
        return concept_recovery(
            codes,
            rows.truth,
            rows.names,
            rows.choosing,
            self.options.threshold,
            lambda done, total: self.progress(done, total, f"recovery in {LEVELS[level]}"),
        )

    def _probe(self, level: str, x: Tensor, rows: _Level) -> dict[str, Tensor]:
        """The same of a probe of tokens [n, T, d]: of a patch's, of the mean of an object's, and of
        an image's first (the class token, where there is one) beside the mean of all."""
        features = x.flatten(0, 1)
        if level == "patch":
            features = features[rows.row >= 0]
        elif level == "object":
            features = mean_rows(features, rows.row)
        else:
            features = torch.cat((x[:, 0], x.mean(dim=1)), dim=1)
        return probe_recovery(
            features, rows.truth, rows.names, rows.choosing, self.options.threshold
        )

    def _tell(self, values: dict[str, Tensor], levels: dict[str, _Level]) -> None:
        """In the log, what is left out."""
        for level, rows in levels.items():
            if left := len(rows.names) - int(values[f"{level}_concepts"]):
                log.info(
                    "recovery leaves out %d of %d concepts in %s: a half of the images has none of "
                    "them, or nothing else",
                    left,
                    len(rows.names),
                    LEVELS[level],
                )


def _named(
    level: str, found: dict[str, Tensor], others: dict[str, dict[str, Tensor]]
) -> dict[str, Tensor]:
    """The scalars of a level by the keys of `NUMBERS`."""
    values = {}
    for number in NUMBERS:
        of, _, key = number.key.partition("_")
        if of != level:
            continue
        key, _, name = (
            key.rpartition("_") if key.rpartition("_")[2] in REFERENCES else (key, "", "")
        )
        source = others[name] if name else found
        values[number.key] = source[f"mean_{key}" if f"mean_{key}" in source else key]
    return values


def _rows(
    level: str,
    names: Sequence[str],
    found: dict[str, Tensor],
    others: dict[str, dict[str, Tensor]],
) -> list[dict[str, Any]]:
    """A row of `concepts.csv` for each concept of a level."""
    columns = {name: found[name] for name in COLUMNS}
    for name, other in others.items():
        columns |= {f"{key}_{name}": other[key] for key in _PER_CONCEPT}
    lists = {name: column.tolist() for name, column in columns.items()}
    return [
        {
            "level": level,
            "attribute": name.partition("=")[0],
            "concept": name,
            **{column: values[v] for column, values in lists.items()},
        }
        for v, name in enumerate(names)
    ]

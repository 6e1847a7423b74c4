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
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from clipsae.evaluation.floors import REFERENCES as FLOORS
from clipsae.evaluation.floors import mean_rows
from clipsae.evaluation.metrics.base import METRICS, Options
from clipsae.evaluation.metrics.concepts import (
    PER_CONCEPT,
    SIZES,
    absorption,
    concept_recovery,
    probe_recovery,
)
from clipsae.evaluation.metrics.sample import CodeSample, WithFloors
from clipsae.evaluation.numbers import Number
from clipsae.evaluation.passes import Batch
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
    **FLOORS,
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
_ABSORPTION = Number(
    "absorption",
    "absorption",
    "share of a shape's patches on which its main latent is silent and another one that is active "
    "there contributes the shape's direction, as a latent for red circles would; mean over the "
    "shapes that have a main latent (AUROC of 0.75 or above)",
    ".1%",
    "min",
)


def _numbers(level: str) -> tuple[Number, ...]:
    scores = [
        replace(
            number,
            headline=(level, number.key) == ("patch", "concepts_found"),
            floor=f"{level}_{number.key}_untrained",
            ceiling=f"{level}_{number.key}_probe",
        )
        for number in _SCORES
    ]
    own = [*scores, *_COUNTS]
    own += {"patch": [_ABSORPTION, _PURITY], "object": [], "image": [_PURITY]}[level]
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
COLUMNS = (
    *SIZES,
    *("auroc", "auroc_latent", "f1", "f1_latent", "f1_threshold", "mcc", "mcc_latent", "latents"),
    "absorption",  # of patches
)
_MAIN = 0.75  # AUROC of a main latent, half-way from chance to perfect: see `absorption`

# Codes that are not zero: 0.2 GB, and several times that while they are sorted.
_ENTRIES = 2**24
# Tokens and truth, float32: 0.13 GB.
_NUMBERS = 2**25
# What the SAE is compared with has fewer of the many patches of background, and where codes are
# mostly not zero, only those of the first images, until there are so many.
_BACKGROUND, _REFERENCE = 1 / 8, 2**23
_IMAGES = 16  # that are pooled at a time


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
    of = group[codes.token]
    here = of >= 0
    if how == "cls":
        rows = torch.arange(len(group), device=group.device)
        first = group.new_full((len(sizes),), len(group))
        first.scatter_reduce_(0, group[group >= 0], rows[group >= 0], "amin")
        here &= first[of] == codes.token
    cells = of[here] * codes.latents + codes.latent[here]
    dense = codes.values.new_zeros(len(sizes) * codes.latents)
    if how == "max":
        dense.scatter_reduce_(0, cells, codes.values[here], "amax")
    else:
        dense = dense.double().index_add_(0, cells, codes.values[here].double())
    dense = dense.view(len(sizes), codes.latents)
    if how == "mean":
        dense = dense / sizes[:, None]
    return SparseCodes.from_dense(dense.to(codes.dtype))


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
    shown = slot >= 0
    patch = truth.any(dim=1)  # the class token has no attributes
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


def _less_background(patches: _Level, objects: _Level) -> _Level:
    """The patches, without most of those that show no object."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.rand(len(patches.row), generator=generator).to(patches.row.device) < _BACKGROUND
    kept = (drawn | (objects.row >= 0))[patches.row >= 0]
    place = torch.where(kept, kept.cumsum(0) - 1, -1)
    row = patches.row.clone()
    row[row >= 0] = place
    return _Level(patches.names, patches.truth[kept], patches.choosing[kept], row)


def _by_level(
    parts: Iterable[SparseCodes], levels: dict[str, _Level], pooling: str, most: int | None = None
) -> dict[str, SparseCodes]:
    """Codes of the rows of each level: of patches, of objects the largest of their patches' codes,
    of images by `pooling`.

    Args:
        parts: codes [b, T, M] of consecutive images.
        most: ends when there are so many codes that are not zero; None: at the last image.

    Returns:
        Codes [N, M] by level; of the level's first rows, where it ended early.
    """
    found: dict[str, list[SparseCodes]] = {level: [] for level in levels}
    done = dict.fromkeys(levels, 0)
    images = pairs = 0
    for codes in parts:
        b, tokens, latents = codes.shape
        here = slice(images * tokens, (images + b) * tokens)
        rows = codes.view(-1, latents)
        for name, level in levels.items():
            row = level.row[here]
            if name == "patch":
                part = rows[row >= 0]
            else:
                row = torch.where(row >= 0, row - done[name], -1)
                part = pool_rows(rows, row, "max" if name == "object" else pooling)
            found[name].append(part)
            done[name] += part.tokens
            pairs += len(part.values)
        images += b
        if most is not None and pairs > most:
            break
    return {level: SparseCodes.stack(several) for level, several in found.items()}


@METRICS.register("recovery")
class ConceptRecovery(WithFloors):
    """`concept_recovery` of a sample of images: by patches, objects and whole images.

    An object's code is the largest of its patches' codes, an image's is pooled by
    `Options.pooling`. The codes, tokens and truth of the sample are kept; where that is too much
    memory, those of a part of the images (`CodeSample`), and the log says of how many. `concepts`
    has each concept's latents, and its scores by what the SAE is compared with (`REFERENCES`),
    which is measured on the same images; of codes that are mostly not zero on the first of them.
    """

    numbers = NUMBERS
    needs = ("truth", "patches")

    def __init__(self, sae: SAE, options: Options) -> None:
        super().__init__(sae, options)
        self._sae = (sae,)  # in a tuple it is no part of this module
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
        rows, numbers = self.drawn(batch)
        if not len(rows):
            return
        x = batch.tokens[rows].float()
        n, tokens = x.shape[:2]
        patches = batch.patch_objects.shape[1]  # the last tokens
        truth = x.new_zeros(n, tokens, batch.patch_truth.shape[2])
        truth[:, -patches:] = batch.patch_truth[rows].to(x)
        objects = x.new_full((n, tokens), -1)
        objects[:, -patches:] = batch.patch_objects[rows].to(x)
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
        codes = SparseCodes(kept.values, kept.positions, (len(beside), tokens, self.latents))
        x, levels = _levels(beside, tokens, self.d)
        flat = x.flatten(0, 1)
        parts = (codes[i : i + _IMAGES] for i in range(0, len(x), _IMAGES))
        found = self._compare(parts, levels)
        fewer = {**levels, "patch": _less_background(levels["patch"], levels["object"])}

        def compare(of: str) -> dict[str, dict[str, Tensor]]:
            parts = (self.floors[of].encode_sparse(part) for part in x.split(_IMAGES))
            return self._compare(parts, fewer, of)

        others = self.others(
            ("recovery", int(self.sample.halvings)),  # of the same images
            lambda: {level: self._probe(level, x, rows) for level, rows in levels.items()},
            compare,
        )
        tokenwise = codes.view(-1, self.latents)
        found["patch"] |= self._absorption(
            tokenwise, flat, levels["patch"], found["patch"], others["probe"]["patch"]
        )
        values: dict[str, Tensor] = {}
        self.concepts = []
        for level in LEVELS:
            beside_it = {of: other[level] for of, other in others.items()}
            values |= _named(level, found[level], beside_it)
            self.concepts += _rows(level, levels[level].names, found[level], beside_it)
        self._tell(values, levels)
        return values

    def _compare(
        self, parts: Iterable[SparseCodes], levels: dict[str, _Level], reference: str = ""
    ) -> dict[str, dict[str, Tensor]]:
        """`concept_recovery` at each level of codes [b, T, M] of consecutive images: the SAE's, or
        those of a reference, which may be of the first images only."""
        codes = _by_level(parts, levels, self.options.pooling, _REFERENCE if reference else None)
        read, total = len(codes["image"]), len(levels["image"].truth)
        if read < total:
            log.info(
                "recovery's %s codes are those of %d of %d images: most of them are not zero",
                reference,
                read,
                total,
            )
        found = {}
        for level, rows in levels.items():
            n = len(codes[level])
            found[level] = concept_recovery(
                codes[level],
                rows.truth[:n],
                rows.names,
                rows.choosing[:n],
                self.options.threshold,
                lambda done, total, of=LEVELS[level]: self.progress(  # type: ignore[misc]
                    done, total, f"recovery in {of}"
                ),
            )
        return found

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

    def _absorption(
        self,
        codes: SparseCodes,
        x: Tensor,
        level: _Level,
        found: dict[str, Tensor],
        probe: dict[str, Tensor],
    ) -> dict[str, Tensor]:
        """`absorption` of each concept on the patches that score it, and its mean over shapes.

        Args:
            codes, x: [n T, M], tokens [n T, d].
        """
        sae, patch = self._sae[0], level.row >= 0
        says = (
            x[patch].double() @ probe["weights"][:-1] + probe["weights"][-1] >= probe["threshold"]
        )
        images = x.view(-1, self.options.tokens, self.d)
        scale = sae.input_scale(images)
        target = (images - scale[..., 1:].sum(dim=-1, keepdim=True)) / scale[..., :1]
        if sae.decoder_bias is not None:
            target = target - sae.decoder_bias
        target = target.flatten(0, 1)[patch]
        absorbed = absorption(
            codes[patch],
            target,
            sae.decoder_rows(),
            probe["weights"][:-1],
            level.truth & says & ~level.choosing[:, None],
            torch.where(found["auroc"] >= _MAIN, found["auroc_latent"], -1),
        )
        if sae.config.get("target_layer") is not None:  # its rows are of another layer's tokens
            absorbed = torch.full_like(absorbed, torch.nan)
        shapes = torch.tensor([name.startswith("shape=") for name in level.names])
        mean = absorbed[shapes.to(absorbed.device)].nanmean()
        return {"absorption": absorbed, "mean_absorption": mean}

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
        source = others.get(name) if name else found
        if source is None:  # a process without images
            continue
        values[number.key] = source[f"mean_{key}" if f"mean_{key}" in source else key]
    return values


def _rows(
    level: str,
    names: Sequence[str],
    found: dict[str, Tensor],
    others: dict[str, dict[str, Tensor]],
) -> list[dict[str, Any]]:
    """A row of `concepts.csv` for each concept of a level."""
    columns = {name: found[name] for name in COLUMNS if name in found}
    for name, other in others.items():
        known = (*PER_CONCEPT, "scoring") if "scoring" in other else PER_CONCEPT
        columns |= {f"{key}_{name}": other[key] for key in known}
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

"""Localisation: does a latent's map of patches lie where the concept is?

For datasets that know what patches show: scenes, and images with masks. The intersection over union
of a unit's thresholded map with a concept's mask is that of Bau et al., "Network Dissection"
(2017), over all images together. Their threshold is a quantile; here it is the best one on one half
of the images, and the latent is chosen there, too; both are scored on the other half.

N patches, M latents, m latents of a block, V concepts.
"""

import logging
from functools import partial

import torch
from torch import Tensor

from clipsae.evaluation.floors import REFERENCES, least_squares
from clipsae.evaluation.metrics.auroc import latent_blocks, starts_of_ties
from clipsae.evaluation.metrics.base import METRICS, Options
from clipsae.evaluation.metrics.sample import CodeSample, WithFloors
from clipsae.evaluation.numbers import Number
from clipsae.evaluation.passes import Batch
from clipsae.evaluation.ranking import top_latents
from clipsae.sae import SAE, SparseCodes

log = logging.getLogger(__name__)

_ROWS = 1024  # patches that are encoded at a time
_BLOCK_ELEMENTS = 2**22  # of float64 arrays [entries, V]: 34 MB
_REFERENCE = 2**23  # codes of what an SAE is compared with
_ENTRIES = 2**24  # codes that are not zero: 0.2 GB, and ten times that while they are sorted


_Thresholds = tuple[Tensor, Tensor, Tensor, Tensor]


def average_precision(codes: SparseCodes, truth: Tensor) -> Tensor:
    """Average precision of each latent's code as a score for each concept: the sum over thresholds
    of (R_k - R_{k-1}) P_k with recall R and precision P; equal codes are taken together.

    Args:
        codes: [N, m], sorted by latent and value as `latent_blocks` yields them.
        truth: float64 [N, V] of 0 and 1.

    Returns:
        float64 [m, V]; the share of positives for a latent that is always the same, NaN for a
        concept that no row has.
    """
    return _average_precision(_thresholds(codes, truth), codes.latents, truth)


def _average_precision(found: _Thresholds, latents: int, truth: Tensor) -> Tensor:
    positives, (latent, _, true, said) = truth.sum(dim=0), found
    # What each threshold adds to what the next higher one finds.
    above = torch.zeros_like(true)
    same = latent[1:] == latent[:-1]
    above[:-1][same] = true[1:][same]
    result = truth.new_zeros(latents, truth.shape[1])
    result.index_add_(0, latent, (true - above) * true / said[:, None])
    return torch.where(positives > 0, result / positives, torch.nan)


def _thresholds(codes: SparseCodes, truth: Tensor) -> _Thresholds:
    """Each different value of each latent, 0 among them, by latent and ascending: the latent [t],
    the value [t], and with all codes from it up predicted the positives among them [t, V] and how
    many they are [t]."""
    start, edges = starts_of_ties(codes).nonzero().squeeze(1), codes.latent_edges()
    hits = truth[codes.token].cumsum(dim=0)
    hits = torch.cat((hits.new_zeros(1, truth.shape[1]), hits))
    latent, value = codes.latent[start].long(), codes.values[start]
    true, said = hits[edges[latent + 1]] - hits[start], edges[latent + 1] - start
    # The zeros of a latent lie between its negative codes and its positive ones.
    zeros = codes.tokens - edges.diff()
    of_zeros = truth.sum(dim=0) - (hits[edges[1:]] - hits[edges[:-1]])
    below = value < 0
    true = torch.where(below[:, None], true + of_zeros[latent], true)
    said = torch.where(below, said + zeros[latent], said)
    positive = edges[:-1] + codes.count(codes.values < 0)  # the first positive pair
    latent = torch.cat((latent, torch.arange(codes.latents, device=latent.device)))
    value = torch.cat((value, value.new_zeros(codes.latents)))
    true = torch.cat((true, hits[edges[1:]] - hits[positive] + of_zeros))
    said = torch.cat((said, edges[1:] - positive + zeros))
    order = value.argsort(stable=True)
    order = order[latent[order].argsort(stable=True)]
    order = order[said[order] > 0]  # none where a latent has neither zeros nor positive codes
    return latent[order], value[order], true[order], said[order].double()


def best_iou(codes: SparseCodes, truth: Tensor) -> tuple[Tensor, Tensor]:
    """The best IoU over thresholds t > 0 of "the concept is there where code >= t", and that t.

    Args:
        codes, truth: as for `average_precision`.

    Returns:
        float64 [m, V]; 0 and infinity for a latent without positive codes, NaN and infinity for a
        concept that no row has.
    """
    return _best_iou(_thresholds(codes, truth), codes.latents, truth)


def _best_iou(found: _Thresholds, latents: int, truth: Tensor) -> tuple[Tensor, Tensor]:
    positives = truth.sum(dim=0)
    latent, value, true, said = (part[found[1] > 0] for part in found)
    iou = true / (said[:, None] + positives - true)
    shape = latents, truth.shape[1]
    best = truth.new_zeros(shape)
    to = latent[:, None].expand_as(iou)
    best.scatter_reduce_(0, to, iou, "amax")
    at = torch.where((iou == best[latent]) & (iou > 0), value[:, None].double(), torch.inf)
    threshold = truth.new_full(shape, torch.inf).scatter_reduce_(0, to, at, "amin")
    none = positives == 0
    return best.masked_fill(none, torch.nan), threshold.masked_fill(none, torch.inf)


def localize(codes: SparseCodes, truth: Tensor, choosing: Tensor) -> dict[str, Tensor]:
    """The latent that lies where each concept is, chosen on some rows and scored on the others.

    Args:
        codes: [N, M], patches.
        truth: BoolTensor [N, V].
        choosing: BoolTensor [N], the rows on which the latents and the thresholds are chosen.

    Returns:
        Per concept [V]: `ap`, `ap_latent`, `iou`, `iou_latent`, `iou_threshold` (float64, int64)
        and `base`, the share of the scored rows that have it, which is the average precision of a
        latent that says nothing. Concepts that one of the halves lacks are NaN and -1.

    Raises:
        ValueError: shapes that do not fit.
    """
    if truth.ndim != 2 or truth.dtype != torch.bool or len(truth) != codes.tokens:
        raise ValueError(
            f"truth {truth.dtype} {tuple(truth.shape)} with {codes.tokens} rows of codes: expected "
            f"bool [{codes.tokens}, V]"
        )
    codes = codes.nonzero()
    here, there = truth[choosing].double(), truth[~choosing].double()
    room = max(1, _BLOCK_ELEMENTS // max(truth.shape[1], 1))
    parts = []
    for _, block in latent_blocks(codes[choosing], pairs=room, latents=room):
        found, m = _thresholds(block, here), block.latents
        parts.append((_average_precision(found, m, here), *_best_iou(found, m, here)))
    chosen = dict(
        zip(("ap", "iou", "iou_threshold"), map(torch.cat, zip(*parts, strict=True)), strict=True)
    )
    defined = here.any(dim=0) & there.any(dim=0)
    scored = codes[~choosing]
    of_concepts = {"base": torch.where(defined, there.mean(dim=0), torch.nan)}
    columns = torch.arange(truth.shape[1], device=truth.device)
    for name in ("ap", "iou"):
        latent = top_latents(chosen[name].nan_to_num(nan=-torch.inf).T.contiguous(), 1)[:, 0]
        own = scored.lookup(latent)  # [N, V]
        if name == "ap":
            values = [
                average_precision(
                    SparseCodes.from_dense(own[:, v : v + 1]).by_latent(), there[:, v : v + 1]
                )[0, 0]
                for v in columns.tolist()
            ]
            value = torch.stack(values) if values else there.new_zeros(0)
        else:
            threshold = chosen["iou_threshold"][latent, columns]
            said = own.double() >= threshold
            both = (said & there.bool()).sum(dim=0).double()
            value = both / (said | there.bool()).sum(dim=0)
            of_concepts["iou_threshold"] = torch.where(defined, threshold, torch.nan)
        of_concepts[name] = torch.where(defined, value, torch.nan)
        of_concepts[f"{name}_latent"] = torch.where(defined, latent, -1)
    return of_concepts


_number = partial(Number, table="probing")


@METRICS.register("localization")
class Localization(WithFloors):
    """`localize` on the patches of a sample of images, whose halves are drawn at random; beside it
    the same of random directions, of an untrained SAE, and of linear probes of the concepts (least
    squares on the half that chooses).

    The sample's codes are kept, and for what they are compared with its tokens; where that is too
    much, those of a part of the patches (`CodeSample`), and the log says how many.
    """

    numbers = (
        _number(
            "localization_ap",
            "localisation, AP",
            "average precision of the map of a concept's latent against the concept's mask, the "
            "latent chosen on the other half of the images; mean over concepts",
            floor="localization_ap_untrained",
            ceiling="localization_ap_probe",
        ),
        _number(
            "localization_iou",
            "localisation, IoU",
            "intersection over union with the concept's mask, latent and threshold chosen on the "
            "other half; mean over concepts",
            floor="localization_iou_untrained",
            ceiling="localization_iou_probe",
        ),
        _number(
            "localization_ap_base",
            "localisation, AP of a map that says nothing",
            "the share of the patches that have a concept, mean over concepts",
            better="",
        ),
        _number("localization_concepts", "localised concepts", format=".0f", better="", table=""),
        *(
            Number(f"localization_{key}_{of}", f"localisation, {label} ({of})", said, table="")
            for key, label in (("ap", "AP"), ("iou", "IoU"))
            for of, said in {**REFERENCES, "probe": "linear probes of the concepts"}.items()
        ),
    )
    needs = ("patch_truth", "patches")

    def __init__(self, sae: SAE, options: Options) -> None:
        super().__init__(sae, options)
        shuffled = torch.Generator().manual_seed(options.seed)
        self.choosing = torch.randperm(len(self.draw.drawn), generator=shuffled) % 2 == 0
        known = len(options.concepts) + 1
        self.patches = CodeSample(
            "localization",
            "patches",
            self.latents,
            torch.empty(0, known, dtype=torch.bool),
            lambda rows, pairs: pairs > _ENTRIES,
        )
        width = known + self.d
        self.tokens = CodeSample(
            "localization (random, untrained, probe)",
            "patches",
            1,
            torch.empty(0, width),
            lambda rows, pairs: rows * width > _ENTRIES,
        )

    def update(self, batch: Batch) -> None:
        rows, numbers = self.drawn(batch)
        if not len(rows):
            return
        truth = batch.patch_truth[rows]
        patches = truth.shape[1]
        codes = batch.patch_codes(rows, patches).view(-1, self.latents)
        half = self.choosing[numbers].to(truth.device)[:, None, None].expand(-1, patches, 1)
        of_patches = (numbers[:, None] * patches + torch.arange(patches)).flatten()
        beside = torch.cat((truth, half), dim=2).flatten(0, 1)
        self.patches.update(of_patches, beside, codes)
        x = batch.tokens[rows, -patches:].float().flatten(0, 1)
        nothing = SparseCodes.from_dense(x.new_zeros(len(x), 1))
        self.tokens.update(of_patches, torch.cat((beside, x), dim=1), nothing)

    def compute(self) -> dict[str, Tensor]:
        """The numbers; NaN without a concept that both halves show."""
        beside, codes = self.patches.compute()
        found = localize(codes, beside[:, :-1].contiguous(), beside[:, -1])
        others = self._beside()
        self.concepts = [
            {
                "level": "localization",
                "concept": name,
                **{key: column[v].item() for key, column in found.items()},
                **{
                    f"{key}_{of}": other[key][v].item()
                    for of, other in others.items()
                    for key in ("ap", "iou")
                },
            }
            for v, name in enumerate(self.options.concepts)
        ]
        return {
            "localization_ap": found["ap"].nanmean(),
            "localization_iou": found["iou"].nanmean(),
            "localization_ap_base": found["base"].nanmean(),
            "localization_concepts": (~found["ap"].isnan()).sum(),
            **{
                f"localization_{key}_{of}": other[key].nanmean()
                for key in ("ap", "iou")
                for of, other in others.items()
            },
        }

    def _beside(self) -> dict[str, dict[str, Tensor]]:
        """`localize` of what the SAE is compared with."""
        beside, _ = self.tokens.compute()
        truth, half, x = beside.split([len(self.options.concepts), 1, self.d], dim=1)
        truth, half = truth > 0, half[:, 0] > 0

        def probe() -> dict[str, Tensor]:
            weights = least_squares(x[half], truth[half])
            scores = x.double() @ weights[:-1] + weights[-1]
            if len(scores):
                scores = scores - scores.amin(dim=0) + 1  # `localize` takes thresholds above 0
            return localize(SparseCodes.from_dense(scores), truth, half)

        same = int(self.tokens.halvings)  # of the same patches
        return self.others(
            ("localization", same), probe, lambda of: self._floor(of, x, truth, half)
        )

    def _floor(self, of: str, x: Tensor, truth: Tensor, half: Tensor) -> dict[str, Tensor]:
        """`localize` of a floor's codes; of a part of the patches, drawn from all of them, where
        most codes are not zero."""
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(self.options.seed))
        order = order.to(x.device)
        parts, pairs = [], 0
        for rows in order.split(_ROWS):
            parts.append(self.floors[of].encode_sparse(x[rows]))
            pairs += len(parts[-1].values)
            if pairs > _REFERENCE:
                break
        codes = SparseCodes.stack(parts)
        if len(codes) < len(x):
            log.info(
                "localization's %s codes are those of %s of %s patches: most are not zero",
                of,
                f"{len(codes):,}",
                f"{len(x):,}",
            )
        read = order[: len(codes)]
        return localize(codes, truth[read], half[read])

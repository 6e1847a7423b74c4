"""Which concepts single latents detect: among their siblings, held out.

A concept is compared with its siblings, the other values of its attribute, on the rows that have
the attribute at all: red with the other colours, on patches of objects. Against all patches, of
which most show background, whatever tells objects from the background would seem to tell red. And
what is chosen, the latent and the threshold of its F1, is chosen on one half of the rows and scored
on the other.

N rows (patches, objects or images), M latents, V concepts, d width.
"""

from collections.abc import Callable, Sequence

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from clipsae.evaluation.floors import least_squares
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
from clipsae.evaluation.ranking import top_latents
from clipsae.sae import SparseCodes

# Of each concept: rows of the half that chooses and of the half that scores.
SIZES = ("choosing", "scoring", "choosing_positives", "scoring_positives")
PER_CONCEPT = ("auroc", "f1", "mcc")
ALIGNED, CONTRIBUTED = 0.1, 0.4  # from which a latent has taken over a concept: `absorption`

# Of float64 arrays [entries, V] and [m, V]: so few that their memory is used again and again.
_BLOCK_ELEMENTS = 2**20


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
    for number, (rows, columns) in enumerate(groups):
        part = codes[rows & choosing]
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
    mass = codes.sum_tokens(codes.values.clamp(min=0) * codes.at_token(choosing.double()))
    most = torch.where(defined, lies, 0).amax(dim=1)
    purity = torch.where(mass > 0, most / mass, torch.nan)

    best = {
        name: top_latents(x.nan_to_num(nan=-torch.inf).T.contiguous(), 1)[:, 0]
        for name, x in (("auroc", area), ("f1", f1))
    }
    best["mcc"] = _one_to_one(r, defined)
    scores = {name: nothing.clone() for name in PER_CONCEPT}
    level = nothing.clone()
    likely = (area >= threshold) & defined
    likely[best["auroc"][defined], defined.nonzero()[:, 0]] = True
    good = torch.zeros_like(likely)
    for rows, columns in groups:
        columns = columns[defined[columns]]
        if not len(columns):
            continue
        was, here = (truth[rows & half][:, columns] for half in (choosing, ~choosing))
        candidates = likely[:, columns].any(dim=1).nonzero()[:, 0]
        again = codes.take(candidates)[rows & ~choosing]
        for first, block in latent_blocks(again, pairs=_BLOCK_ELEMENTS, latents=_BLOCK_ELEMENTS):
            of = candidates[first : first + block.latents, None]
            area[of, columns] = auroc(block, here.double())
            good[of, columns] = area[of, columns] >= threshold
        scores["auroc"][columns] = area[best["auroc"][columns], columns]
        values = codes.columns(best["f1"][columns])
        level[columns] = f1_threshold(values[rows & choosing], was)
        scores["f1"][columns] = f1_above(values[rows & ~choosing], here, level[columns])
        partner = best["mcc"][columns]
        values = codes.columns(partner.clamp(min=0))[rows & ~choosing]
        scores["mcc"][columns] = torch.where(partner >= 0, column_correlation(values, here), 0)
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
        "splitting": latents[scores["auroc"] >= threshold].double().mean(),
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
        truth: BoolTensor [N, V].
        names: of the V concepts, "attribute=value".
        choosing: BoolTensor [N], the half that fits.
        threshold: the AUROC from which a concept counts as found.

    Returns:
        `auroc`, `f1`, `mcc` per concept, float64 [V], and the scalars `mean_auroc`, `mean_f1`,
        `mean_mcc`, `concepts_found`, `concepts`, as there; `weights`, float64 [d + 1, V], the
        intercepts last, and `threshold`, float64 [V], of F1; NaN for concepts that are not defined.

    Raises:
        ValueError: as there.
    """
    _check(len(features), truth, names, choosing, threshold)
    nothing = truth.new_full((truth.shape[1],), torch.nan, dtype=torch.float64)
    found = {key: nothing.clone() for key in PER_CONCEPT}
    level, weights = nothing.clone(), nothing.repeat(features.shape[1] + 1, 1)
    groups = siblings(truth, names)
    defined = _defined(_sizes(truth, groups, choosing))
    for rows, columns in groups:
        columns = columns[defined[columns]]
        if not len(columns):
            continue
        halves = rows & choosing, rows & ~choosing
        x, y = (features[half].double() for half in halves)
        was, here = (truth[half][:, columns] for half in halves)
        weights[:, columns] = w = least_squares(x, was)
        fitted, scores = x @ w[:-1] + w[-1], y @ w[:-1] + w[-1]
        low = torch.cat((fitted, scores)).amin(dim=0) - 1  # `f1_threshold` reads positive scores
        level[columns] = f1_threshold(fitted - low, was) + low
        sparse = SparseCodes.from_dense(scores - low).by_latent()
        found["auroc"][columns] = auroc(sparse, here.double()).diagonal()
        found["f1"][columns] = f1_above(scores, here, level[columns])
        found["mcc"][columns] = column_correlation(scores, here)
    return found | {
        **{f"mean_{key}": value.nanmean() for key, value in found.items()},
        "concepts_found": (found["auroc"] >= threshold)[defined].double().mean(),
        "concepts": defined.sum(),
        "weights": weights,
        "threshold": level,
    }


def absorption(
    codes: SparseCodes,
    target: Tensor,
    decoder: Tensor,
    directions: Tensor,
    shown: Tensor,
    main: Tensor,
) -> Tensor:
    """How often a concept's main latent is silent because another one has taken it over.

    Chanin et al., "A is for Absorption", 2024 (arXiv 2409.14507): where one latent is active on
    circles and another on red circles, sparsity silences the first on red circles, and the second
    takes over its direction. A row that shows the concept is absorbed if its main latent is silent,
    and another one, active there, has the concept's direction (the cosine of its decoder row with
    the probe's weights is at least 0.1) and by itself contributes at least 0.4 of the token's
    projection on it. The two shares are SAEBench's (github.com/adamkarvonen/SAEBench).

    Args:
        codes: [N, M], positions ascending.
        target: [N, d], what the latents add up to: tokens less the decoder's bias (of an SAE that
            normalises its input, tokens divided by their norms).
        decoder: [M, d], its rows.
        directions: [d, V], weights of a linear probe of each concept.
        shown: BoolTensor [N, V], the rows that show a concept and where the probe says so.
        main: LongTensor [V], the main latent of each concept; -1: it has none.

    Returns:
        Share of the rows that are absorbed, float64 [V]; NaN without a main latent or such rows.
    """
    directions = directions.to(decoder)
    along = decoder @ directions  # [M, V]
    norms = decoder.norm(dim=1)[:, None] * directions.norm(dim=0)
    aligned = along >= ALIGNED * norms
    wanted = target.to(decoder) @ directions  # [N, V]
    found = directions.new_full((len(main),), torch.nan, dtype=torch.float64)
    for v in (main >= 0).nonzero()[:, 0].tolist():
        rows = shown[:, v]
        if not rows.any():
            continue
        of_rows = codes[rows]
        silent = of_rows.columns(main[v : v + 1])[:, 0] <= 0
        part = of_rows.values * along[of_rows.latent, v]
        part = torch.where(aligned[of_rows.latent, v] & (of_rows.latent != main[v]), part, 0)
        largest = part.new_zeros(of_rows.tokens).scatter_reduce(0, of_rows.token, part, "amax")
        projection = wanted[rows, v]  # where it is not above 0 there is nothing to take over
        taken = (projection > 0) & (largest > 0) & (largest >= CONTRIBUTED * projection)
        found[v] = (silent & taken).double().mean()
    return found


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

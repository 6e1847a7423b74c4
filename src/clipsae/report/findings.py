"""The report's opening: what the data say, in sentences that are computed from them."""

import math
import statistics
from collections.abc import Iterator

import pandas as pd

from clipsae.report.collect import NO_K
from clipsae.report.missing import ALL, Missing
from clipsae.report.names import WITH_K, column_title, dataset_title, listed
from clipsae.report.noise import RULE
from clipsae.report.plots import BESIDE, FOUND, concept_means, mean_support
from clipsae.report.select import Selection
from clipsae.report.settings import Line
from clipsae.report.table import Table, number
from clipsae.report.tables import (
    Compared,
    accuracy_columns,
    accuracy_tables,
    average_cell,
    compared,
)

LARGEST_DIFFERENCE = 2.0  # points between `no_sae` and the published figure
GUIDED_BY = "on_10"
# Fewer say nothing that holds beyond them, and get no sentence.
FEWEST_DATASETS = 3
FEWEST_K = 3
FEWEST_PUBLISHED = 6
NAMED = 8  # numbers that tell no variants apart, at most


def findings(selection: Selection, missing: list[Missing]) -> list[str]:
    """Sentences, most important first; those that the data do not carry are left out. Only results
    with the same settings are compared: a sentence for each group of them."""
    groups = [
        (f"With {group.group}: " if group.group else "", group)
        for group in compared(selection, selection.eleven or selection.others)
        if len(group.datasets) >= FEWEST_DATASETS
    ]
    return [
        _filled(selection, missing),
        *(start + said for start, group in groups for said in _winners(selection, group)),
        *_against_published(selection),
        *(start + said for start, group in groups for said in _sparsity(selection, group)),
        *_guidance(selection),
    ]


def _called(selection: Selection, line: Line) -> str:
    """A line's title where its group was already named."""
    title = selection.title(line)
    return title.replace(f", {line.common}", "", 1) if line.common else title


def _range(low: float, high: float, digits: int = 0) -> str:
    low_text, high_text = number(low, digits), number(high, digits)
    return low_text if low_text == high_text else f"{low_text} to {high_text}"


def _filled(selection: Selection, missing: list[Missing]) -> str:
    pairs = {(m, d) for m in selection.expected for d in selection.classified}
    empty = {(gap.model, gap.dataset) for gap in missing if gap.what == ALL} & pairs
    sentence = f"{len(pairs - empty)} of {len(pairs)} pairs of a model and a dataset have results"
    seeds = selection.cells.seeds[selection.cells.line.isin(selection.lines)]
    if len(seeds) and seeds.max() > 1:
        sentence += f", with {_range(seeds.min(), seeds.max())} seeds each"
    return sentence + (f"; {len(missing)} commands would fill the gaps." if missing else ".")


def _winners(selection: Selection, group: Compared) -> Iterator[str]:
    """Who leads at each n."""
    leading: dict[str, list[str]] = {}
    counts, agree, noisy, clear = [], [], [], []
    for key in accuracy_columns(selection, group.datasets):
        ours = group.values(selection, selection.cells, key)
        if key == "no_sae" or len(ours) < FEWEST_DATASETS:
            continue
        mean = ours.mean()
        best = mean.idxmax()
        counts.append(len(ours))
        title = column_title(key, selection.wanted.latents)
        leading.setdefault(_called(selection, best), []).append(
            f"{title} ({number(mean[best], 2)} %)"
        )
        second = mean.drop(best).idxmax()
        first, other = (
            average_cell(selection, selection.runs, line, tuple(ours.index), key)
            for line in (best, second)
        )
        apart = first.differs(other)
        if apart is not None:
            (clear if apart else noisy).append(f"{title} (before {_called(selection, second)})")
        theirs = group.published(ours.index, key)
        if len(theirs):
            agree.append(theirs.mean().idxmax() == best)
    if not leading:
        return
    parts = [f"{title} at {listed(columns)}" for title, columns in leading.items()]
    runs = selection.runs[selection.runs.dataset.isin(group.datasets)]
    seeds = max(selection.rows(runs, line).seed.nunique() for line in group.lines)
    yield (
        f"Highest mean accuracy over the {_range(min(counts), max(counts))} datasets that "
        f"{len(group.lines)} models share: {'; '.join(parts)}."
        + " One seed each: the spread over seeds is unknown."
        * (seeds < 2)
    )
    if noisy or clear:
        parts = [f"within the noise of the seeds at {listed(noisy)}"] if noisy else []
        parts += [f"beyond it at {listed(clear)}"] if clear else []
        yield f"The lead over the second is {', '.join(parts)} ({RULE})."
    if agree:
        yield (
            f"The best model is the paper's at {sum(agree)} of {len(agree)} values of n, over the "
            "same datasets."
        )


def _against_published(selection: Selection) -> Iterator[str]:
    cells = [
        (cell.difference, row.labels[0], dataset, key)
        for dataset in selection.eleven
        for row in accuracy_tables(selection, dataset)[0].rows
        for key, cell in row.cells.items()
        if cell.difference is not None
    ]
    differences = [cell for cell in cells if cell[3] != "no_sae"]
    if len(differences) >= FEWEST_PUBLISHED:
        middle = statistics.median(abs(d) for d, *_ in differences)
        largest, model, dataset, key = max(differences, key=lambda found: abs(found[0]))
        yield (
            f"{len(differences)} accuracies have a published counterpart: the median difference is "
            f"{number(middle, 2)} points, the largest is "
            f"{column_title(key, selection.wanted.latents)} of {model} on "
            f"{dataset_title(dataset)} ({number(largest, 2, signed=True)})."
        )
    alone = {d: off for off, _, d, key in cells if key == "no_sae"}
    far = {d: off for d, off in alone.items() if abs(off) > LARGEST_DIFFERENCE}
    if far:
        where = [f"{dataset_title(d)} ({number(off, 2, signed=True)})" for d, off in far.items()]
        why = "; the published figure of Caltech101 rests on mismatched class names"
        yield (
            f"CLIP without an SAE is more than {LARGEST_DIFFERENCE:g} points off the published "
            f"figure on {listed(where)}: check the split, the class names and the prompts"
            f"{why * ('caltech101' in far)}."
        )


def _sparsity(selection: Selection, group: Compared) -> Iterator[str]:
    """Fewest latents and lowest FVU."""
    tables = [group.values(selection, selection.metrics, metric) for metric in ("l0", "fvu")]
    if min(map(len, tables)) < FEWEST_DATASETS:
        return
    l0, fvu = (table.mean() for table in tables)
    sparse, faithful = l0.idxmin(), fvu.idxmin()
    title, fewest = _called(selection, sparse), number(l0[sparse], 1)
    noise = ""
    for metric, said, table in (("l0", "numbers of latents", l0), ("fvu", "FVUs", fvu)):
        pair, over = list(table.nsmallest(2).index), tuple(tables[0].index)
        first, other = (
            average_cell(selection, selection.measured, line, over, metric) for line in pair
        )
        if first.differs(other) is False:
            names = listed([_called(selection, line) for line in pair])
            noise += f" The {said} of {names} differ by no more than the noise of the seeds."
    fvus = [f"FVU {number(fvu[line], 3)}" for line in (sparse, faithful)]
    sentence = (
        f"{title} uses the fewest latents per token ({fewest}, {fvus[0]}); "
        f"{_called(selection, faithful)} reconstructs best ({fvus[1]}, "
        f"{number(l0[faithful], 1)} latents)."
        if sparse != faithful
        else f"{title} uses the fewest latents per token ({fewest}) and reconstructs best "
        f"({fvus[0]})."
    )
    yield sentence + noise


def concepts_found(selection: Selection, concepts: pd.DataFrame, dataset: str) -> Iterator[str]:
    """Of which attributes no concept is found by any variant, though a probe finds one, at patches
    (AUROC of `plots.FOUND`, mean over seeds)."""
    table = concept_means(selection, concepts, dataset).get("patch")
    if table is None:
        return
    attributes = table.index.str.partition("=").get_level_values(0)
    probe = table.get("probe")
    best = table.drop(columns=[*BESIDE], errors="ignore").max(axis=1)
    found, top = (best >= FOUND).groupby(attributes, sort=False), best.groupby(attributes)
    some = [
        f"{int(n)} of {len(g)} of {name}" for (name, g), n in zip(found, found.sum(), strict=True)
    ]
    sentence = (
        f"Concepts that a latent of some variant tells among patches of {dataset_title(dataset)} "
        f"(AUROC of at least {FOUND}): {', '.join(some)}"
    )
    if probe is not None:
        possible = (probe >= FOUND).groupby(attributes, sort=False).any()
        missed = [
            f"{name} (best {number(top.max()[name], 2)})"
            for name, some_found in found.any().items()
            if possible[name] and not some_found
        ]
        if missed:
            sentence += f"; a probe tells some of {listed(missed)}, and no variant does"
    yield f"{sentence}."


def tells_apart(tables: list[Table]) -> Iterator[str]:
    """Which numbers tell the variants apart, of each noise table."""
    for table in tables:
        tell = [row.labels[0] for row in table.rows if row.labels[1] == "yes"]
        noise = [row.labels[0] for row in table.rows if row.labels[1] == "no"]
        where = table.title.partition(": ")[2]
        sentence = (
            f"{len(tell)} of {len(table.rows)} numbers on {where} tell the variants apart, by more "
            "than the noise of their seeds (F test, 5 %)"
        )
        if len(noise) > NAMED:
            sentence += f"; the noisiest of the others: {'; '.join(noise[: -NAMED - 1 : -1])}"
        elif noise:
            sentence += f"; these do not: {'; '.join(noise)}"
        yield f"{sentence}."


def _guidance(selection: Selection) -> Iterator[str]:
    """How good the k is that the Sparsemax SAE's mean support suggests, over all sweeps of at least
    `FEWEST_K` values on both sides of it."""
    cells = selection.cells[(selection.cells.metric == GUIDED_BY) & (selection.cells.k > NO_K)]
    guides = {x.common: x for x in reversed(selection.lines) if x.model == "sparsemax"}
    supports, losses = [], []
    for line in selection.lines:
        if line.model not in WITH_K or line.common not in guides:
            continue
        for dataset in selection.datasets:
            support = mean_support(selection, dataset, guides[line.common])
            swept = cells[cells.line.eq(line) & cells.dataset.eq(dataset)].set_index("k").value
            if support is None or len(swept) < FEWEST_K:
                continue
            if min(swept.index) <= support <= max(swept.index):
                nearest = min(swept.index, key=lambda k: abs(math.log(k / support)))
                supports.append(support)
                losses.append(float(swept.max() - swept[nearest]))
    if losses:
        yield (
            f"The Sparsemax SAE's mean support is {_range(min(supports), max(supports), 1)}. The "
            f"swept k nearest to it is the best by {GUIDED_BY} in {losses.count(0)} of "
            f"{len(losses)} sweep{'s' * (len(losses) > 1)} of TopK and BatchTopK, and "
            f"{number(statistics.fmean(losses), 2)} points below the best on average."
        )

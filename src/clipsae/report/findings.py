"""The report's opening: what the data say, in sentences that are computed from them."""

import math
import statistics
from collections.abc import Iterator

from clipsae.report.collect import NO_K
from clipsae.report.missing import ALL, Missing
from clipsae.report.names import WITH_K, column_title, dataset_title
from clipsae.report.plots import mean_support
from clipsae.report.select import Selection, of_line
from clipsae.report.table import number
from clipsae.report.tables import (
    Compared,
    accuracy_columns,
    compared,
    dataset_table,
    pivot,
    published_pivot,
    row_title,
)
from clipsae.report.variants import Line

LARGEST_DIFFERENCE = 2.0  # points between `no_sae` and the published figure
GUIDED_BY = "on_10"
# Fewer say nothing that holds beyond them, and get no sentence.
FEWEST_DATASETS = 3
FEWEST_K = 3
FEWEST_PUBLISHED = 6


def findings(selection: Selection, missing: list[Missing]) -> list[str]:
    """Sentences, most important first; those that the data do not carry are left out. Compared is
    what is alike: a sentence for each group of alike results."""
    datasets = selection.eleven or selection.others
    groups = [of for of in compared(selection, datasets) if len(of.datasets) >= FEWEST_DATASETS]
    return [
        *_filled(selection, missing),
        *(f"{_with(of.group)}{said}" for of in groups for said in _winners(selection, of)),
        *_against_published(selection),
        *(f"{_with(of.group)}{said}" for of in groups for said in _sparsity(selection, of)),
        *_guidance(selection),
    ]


def _called(selection: Selection, line: Line) -> str:
    """A line's title where its group is told already."""
    title = row_title(selection, line)
    return title.replace(f", {line.common}", "", 1) if line.common else title


def _with(group: str) -> str:
    return f"With {group}: " if group else ""


def _filled(selection: Selection, missing: list[Missing]) -> Iterator[str]:
    pairs = [(m, d) for m in selection.expected for d in selection.datasets]
    empty = {(gap.model, gap.dataset) for gap in missing if gap.what == ALL}
    filled = len(pairs) - len(empty & set(pairs))
    seeds = selection.cells.seeds
    spread = ""
    if len(seeds) and seeds.max() > 1:
        low, high = int(seeds.min()), int(seeds.max())
        spread = f", with {low} to {high} seeds each" if low < high else f", with {high} seeds each"
    yield (
        f"{filled} of {len(pairs)} pairs of a model and a dataset have results{spread}"
        + (f"; {len(missing)} commands would fill what is missing." if missing else ".")
    )


def _winners(selection: Selection, of: Compared) -> Iterator[str]:
    """Who leads at each n."""
    leading: dict[str, list[str]] = {}
    counts, agree, comparable = set(), 0, 0
    for column in accuracy_columns(selection, of.datasets):
        ours = pivot(selection.cells, selection, of, column)
        if column == "no_sae" or len(ours) < FEWEST_DATASETS:
            continue
        mean = ours.mean()
        best = mean.idxmax()
        counts.add(len(ours))
        title = column_title(column, selection.wanted.latents)
        leading.setdefault(_called(selection, best), []).append(
            f"{title} ({number(mean[best], 2)} %)"
        )
        theirs = published_pivot(of.lines, ours.index, column)
        if len(theirs):
            comparable += 1
            agree += theirs.mean().idxmax() == best
    if not leading:
        return
    low, high = min(counts), max(counts)
    over = f"{low} to {high}" if low < high else f"{high}"
    parts = [f"{title} at {_listed(columns)}" for title, columns in leading.items()]
    runs = selection.runs[selection.runs.dataset.isin(of.datasets)]
    seeds = max(selection.rows(runs, line).seed.nunique() for line in of.lines)
    once = "" if seeds > 1 else " One seed each: how much of this is chance is not known."
    yield (
        f"Highest mean accuracy over the {over} datasets that {len(of.lines)} models share: "
        f"{'; '.join(parts)}.{once}"
    )
    if comparable:
        yield (
            f"The best model is the published one at {agree} of {comparable} values of n, over the "
            "same datasets."
        )


def _against_published(selection: Selection) -> Iterator[str]:
    differences, alone = [], {}
    for dataset in selection.eleven:
        for row in dataset_table(selection, dataset).rows:
            for column, cell in row.cells.items():
                if cell.difference is None:
                    continue
                if column == "no_sae":
                    alone[dataset] = cell.difference
                else:
                    differences.append((cell.difference, row.labels[0], dataset, column))
    if len(differences) >= FEWEST_PUBLISHED:
        middle = statistics.median(abs(d) for d, *_ in differences)
        largest, model, dataset, column = max(differences, key=lambda found: abs(found[0]))
        yield (
            f"{len(differences)} accuracies have a published counterpart: they differ by "
            f"{number(middle, 2)} points in the median, most in "
            f"{column_title(column, selection.wanted.latents)} of {model} on "
            f"{dataset_title(dataset)} ({number(largest, 2, signed=True)})."
        )
    far = {name: off for name, off in alone.items() if abs(off) > LARGEST_DIFFERENCE}
    if far:
        listed = [f"{dataset_title(d)} ({number(far[d], 2, signed=True)})" for d in far]
        yield (
            f"CLIP without an SAE is more than {LARGEST_DIFFERENCE:g} points off the published "
            f"figure on {_listed(listed)}: look at the split, the class names and the prompts"
            + (
                "; Caltech101's published one rests on mismatched names." * ("caltech101" in far)
                or "."
            )
        )


def _sparsity(selection: Selection, of: Compared) -> Iterator[str]:
    """Fewest latents and lowest FVU."""
    tables = [pivot(selection.metrics, selection, of, metric) for metric in ("l0", "fvu")]
    if min(map(len, tables)) < FEWEST_DATASETS:
        return
    l0, fvu = (table.mean() for table in tables)
    sparse, faithful = l0.idxmin(), fvu.idxmin()
    title = _called(selection, sparse)
    yield (
        f"{title} uses the fewest latents of a token ({number(l0[sparse], 1)}, "
        f"FVU {number(fvu[sparse], 3)}); {_called(selection, faithful)} reconstructs best (FVU "
        f"{number(fvu[faithful], 3)}, {number(l0[faithful], 1)} latents)."
        if sparse != faithful
        else f"{title} uses the fewest latents of a token "
        f"({number(l0[sparse], 1)}) and reconstructs best (FVU {number(fvu[sparse], 3)})."
    )


def _guidance(selection: Selection) -> Iterator[str]:
    """How good the k is that the Sparsemax SAE's mean support suggests, over all sweeps of at least
    `FEWEST_K` values on both sides of it."""
    cells = selection.cells[selection.cells.metric == GUIDED_BY]
    supports, losses = [], []
    for line in selection.lines:
        guide = next(
            (x for x in selection.lines if x.model == "sparsemax" and x.common == line.common), None
        )
        if line.model not in WITH_K or guide is None:
            continue
        for dataset in selection.datasets:
            support = mean_support(selection, dataset, guide)
            of = of_line(cells[(cells.dataset == dataset) & (cells.k > NO_K)], line)
            of = of.set_index("k").value
            if support is None or len(of) < FEWEST_K:
                continue
            if not min(of.index) <= support <= max(of.index):
                continue
            nearest = min(of.index, key=lambda k: abs(math.log(k / support)))
            supports.append(support)
            losses.append(float(of.max() - of[nearest]))
    if not losses:
        return
    low, high = number(min(supports), 1), number(max(supports), 1)
    best = sum(loss == 0 for loss in losses)
    mean = number(statistics.fmean(losses), 2)
    yield (
        f"The Sparsemax SAE's mean support is {low if low == high else f'{low} to {high}'}. The "
        f"swept k nearest to it is the best by {GUIDED_BY} in {best} of "
        f"{_count(len(losses), 'sweep')} of TopK and BatchTopK, and {mean} points below the best "
        "on average."
    )


def _count(n: int, what: str) -> str:
    return f"{n} {what}" + ("s" if n != 1 else "")


def _listed(words: list[str], last: str = "and") -> str:
    return ", ".join(words[:-1]) + f" {last} {words[-1]}" if len(words) > 1 else words[0]

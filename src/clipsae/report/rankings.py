"""Both rankings of a class's latents, and both protocols, side by side for the same SAEs: does the
order of the variants survive another way to choose a class's latents?"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations, product

import pandas as pd
from scipy import stats

from clipsae.evaluation.numbers import Number
from clipsae.report.names import column_order, column_title, dataset_title, listed
from clipsae.report.select import Selection
from clipsae.report.settings import Line
from clipsae.report.table import Cell, Row, Table, number
from clipsae.report.tables import largest_common

Way = tuple[str, str]
WAYS: tuple[Way, ...] = tuple(product(("paper", "heldout"), ("frequency", "contrast")))
PAPERS: Way = WAYS[0]
_SAID = {
    ("paper", "contrast"): "ranked by contrast",
    ("heldout", "frequency"): "counted on the training split",
    ("heldout", "contrast"): "counted on the training split and ranked by contrast",
}


@dataclass(frozen=True)
class SideBySide:
    """Accuracies of the same lines on the same datasets.

    Attributes:
        cells: (way, metric) -> line -> mean over the datasets, with the spread of the seeds' means.
    """

    ways: tuple[Way, ...]
    lines: tuple[Line, ...]
    datasets: tuple[str, ...]
    metrics: tuple[str, ...]
    cells: dict[tuple[Way, str], dict[Line, Cell]]


def side_by_side(selection: Selection) -> SideBySide | None:
    """None: no SAE is evaluated in the paper's way and another. Lines and datasets are those that
    the paper's way shares with the one that shares most; other ways have what they have of these.
    on_M has no ranking and is left out."""
    rows = selection.ways
    rows = rows[rows.tabled & rows.line.isin(selection.lines) & rows.metric.str.startswith("on_")]
    rows = rows[rows.metric.ne("on_all")].dropna(subset="value")
    has: dict[Way, set[tuple[Line, str]]] = {}
    for (protocol, ranking), found in rows.groupby(["protocol", "ranking"]):
        has[protocol, ranking] = set(zip(found.line, found.dataset, strict=True))
    both = {way: has.get(PAPERS, set()) & has.get(way, set()) for way in WAYS[1:]}
    shared = max(both.values(), key=len)
    if not shared:
        return None
    on = {line: {d for x, d in shared if x == line} for line in selection.lines}
    datasets = largest_common(on, 1)
    complete = [line for line in selection.lines if datasets <= on[line]]
    rows = rows[rows.dataset.isin(datasets)]
    metrics = tuple(sorted(set(rows.metric), key=column_order))
    cells = {}
    for way, metric in product(WAYS, metrics):
        chosen = rows[rows.protocol.eq(way[0]) & rows.ranking.eq(way[1]) & rows.metric.eq(metric)]
        found = {line: _mean(chosen[chosen.line.eq(line)], len(datasets)) for line in complete}
        cells[way, metric] = {line: cell for line, cell in found.items() if cell is not None}
    ordered = tuple(name for name in selection.datasets if name in datasets)
    ways = tuple(way for way in WAYS if any(cells[way, metric] for metric in metrics))
    return SideBySide(ways, tuple(complete), ordered, metrics, cells)


def _mean(rows: pd.DataFrame, datasets: int) -> Cell | None:
    """Over the datasets the mean over seeds; None: one of them is missing."""
    table = rows.pivot(index="seed", columns="dataset", values="value")
    if table.shape[1] < datasets:
        return None
    of_seeds = table.dropna().mean(axis=1)
    std = float(of_seeds.std()) if len(of_seeds) > 1 else None
    return Cell(float(table.mean().mean()), std, len(of_seeds))


def rankings_table(selection: Selection, found: SideBySide) -> Table:
    """A block for each n, a column for each way."""
    rows = []
    for metric in found.metrics:
        block = column_title(metric, selection.wanted.latents)
        for line in found.lines:
            cells = {
                "_".join(way): found.cells[way, metric][line]
                for way in found.ways
                if line in found.cells[way, metric]
            }
            rows.append(Row((selection.title(line),), cells, line.model, block))
    over = dataset_title(found.datasets[0])
    if len(found.datasets) > 1:
        over = f"mean over {listed([*map(dataset_title, found.datasets)])}"
    return Table(
        "rankings",
        "How a class's latents are ranked and counted",
        "Macro accuracy in percent of the same SAEs. Frequency, the paper's: the latents active "
        "most often on the class's images; contrast: more often than on the mean class's, "
        "(count - mean) / sqrt(mean + 1). Paper: counted on the evaluated images; heldout: on the "
        f"training split. {over[:1].upper()}{over[1:]}.",
        tuple(Number("_".join(w), f"{w[1]}, {w[0]}", format=".2f") for w in found.ways),
        tuple(rows),
    )


def order_kept(selection: Selection, found: SideBySide) -> Iterator[str]:
    """For each other way, whether the order of the variants at each n is that of the paper's way:
    the best one, Kendall's tau, and pairs that turn by more than the noise of the seeds."""
    if len(found.lines) < 3:
        return
    for way in found.ways[1:]:
        same, taus, turned, pairs, known = [], [], [], 0, True
        for metric in found.metrics:
            before, after = found.cells[PAPERS, metric], found.cells[way, metric]
            lines = [line for line in found.lines if line in before and line in after]
            if len(lines) < 3:
                continue
            title = column_title(metric, selection.wanted.latents)
            a, b = ([cells[line].ours for line in lines] for cells in (before, after))
            taus.append((float(stats.kendalltau(a, b).statistic), title))
            if max(lines, key=lambda x: before[x].ours) == max(lines, key=lambda x: after[x].ours):
                same.append(title)
            for x, y in combinations(lines, 2):
                apart = before[x].differs(before[y]), after[x].differs(after[y])
                known &= None not in apart
                pairs += apart[0] is not False
                if (before[x].ours - before[y].ours) * (after[x].ours - after[y].ours) < 0 and (
                    False not in apart
                ):
                    turned.append(title)
        if not taus:
            continue
        listed_taus = listed([f"{number(tau, 2)} at {title}" for tau, title in taus])
        best = f"at {listed(same)}" if same else "at no n"
        noise = (
            "that the seeds tell apart before and after"
            if known
            else "(differences within the noise of seeds included, as not all have two seeds)"
        )
        yield (
            f"With a class's latents {_SAID[way]}, the variant that is best in the paper's way "
            f"stays so {best}; Kendall's tau of the two orders of {len(found.lines)} variants is "
            f"{listed_taus}; {len(turned)} of {pairs} pairs {noise} turn round."
        )

"""The report's plots: accuracy over n, over k, sparsity against FVU, concepts, noise.

Drawn without pyplot, so that nothing global is touched. Every model has its one colour and marker.
"""

from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from clipsae.report import published
from clipsae.report.collect import NO_K
from clipsae.report.names import column_order, column_title, dataset_title, model_style, slug
from clipsae.report.select import Selection
from clipsae.report.settings import Line
from clipsae.report.table import Table

WIDTH = 4.4  # inches: on a phone 360 pixels wide a 10-point letter is 10 pixels high
INK = "#1b1f24"  # of text and axes: the page replaces it by the reader's own
INK_ON_LIGHT = "#1b1f25"  # of marks on bright colours: the same on every page
FOUND = 0.9  # AUROC from which a concept is marked as found
ON_THE_MAP = f"0.5 is chance. A dot: at least {FOUND}."
BESIDE = ("untrained", "random", "probe")  # what concepts are found by that is no variant
_INKED = ("axes.edgecolor", "axes.labelcolor", "grid.color", "text.color", "xtick.color")
_EMPTY = ("figure.facecolor", "axes.facecolor", "savefig.facecolor")
STYLE: Any = {
    **dict.fromkeys((*_INKED, "ytick.color"), INK),
    **dict.fromkeys(_EMPTY, "none"),
    **{"font.size": 10, "axes.spines.top": False, "axes.spines.right": False},
    **{"axes.grid": True, "grid.alpha": 0.14, "grid.linewidth": 0.6, "lines.linewidth": 1.6},
    **{"legend.frameon": False, "legend.fontsize": 9},
    **{"legend.columnspacing": 1.2, "legend.handlelength": 1.6},
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "clipsae",  # the same data, the same file
    "pdf.fonttype": 42,
}


@dataclass(frozen=True)
class Plot:
    """A figure and its caption."""

    name: str  # of its files
    title: str
    caption: str
    figure: Figure


def accuracy_plot(selection: Selection, dataset: str) -> Plot | None:
    """Accuracy over n, a line a model, published ones dashed; None: nothing of ours."""
    cells = pd.concat([selection.of(line, dataset) for line in selection.lines])
    cells = cells[cells.metric.eq("no_sae") | cells.metric.str.startswith("on_")]
    if cells.empty:
        return None
    keys = sorted({key for key in cells.metric if key != "no_sae"}, key=column_order)
    position = {key: x for x, key in enumerate(keys)}
    known = published.zero_shot()
    with matplotlib.rc_context(STYLE):
        figure, (axes,) = _figure(3.4)
        for line in selection.lines:
            mine = cells[cells.line.eq(line) & cells.metric.isin(keys)]
            style = _style(selection, line)
            _curve(axes, mine.assign(x=mine.metric.map(position)), style, selection.title(line))
            theirs = {key: known.get((dataset, line.model, key)) for key in keys}
            points = [(position[key], float(y)) for key, y in theirs.items() if y is not None]
            if points and style["linestyle"] == "-":
                xy = zip(*points, strict=True)
                axes.plot(*xy, color=style["color"], linestyle=(0, (3, 2)), linewidth=1)
        alone = cells[cells.metric == "no_sae"].value
        if len(alone):
            axes.axhline(alone.mean(), color=INK, linewidth=1, linestyle=":", label="no SAE")
        titles = [column_title(key, selection.wanted.latents).removeprefix("on_") for key in keys]
        axes.set_xticks(range(len(keys)), titles)
        axes.set_xlabel("latents of the class kept, n")
        axes.set_ylabel("macro accuracy, %")
        axes.set_ylim(bottom=0)
        _legend(figure, axes)
    paper = " Dashed: published." if dataset in published.table_numbers() else ""
    caption = f"Steps of n are drawn evenly. Dotted: CLIP alone.{paper}{_spread(cells)}"
    title = f"{dataset_title(dataset)}: accuracy over n"
    return Plot(f"accuracy_{slug(dataset)}", title, caption, figure)


def k_plot(selection: Selection, dataset: str) -> Plot | None:
    """Accuracy over k, a panel an n, the Sparsemax SAE at its mean support; None: no sweep."""
    cells = selection.cells[selection.cells.dataset == dataset]
    swept = [line for line in selection.lines if len(swept_k(cells, line)) > 1]
    if not swept:
        return None
    cells = cells[cells.metric.str.startswith("on_")]
    of_swept = cells[cells.line.isin(swept)]
    columns = sorted(set(of_swept.metric), key=column_order)
    rows = -(-len(columns) // 2)
    with matplotlib.rc_context(STYLE):
        figure, panels = _figure(1.0 + 1.75 * rows, rows, 2 if len(columns) > 1 else 1)
        for axes, column in zip(panels, columns, strict=False):
            here = cells[cells.metric == column]
            for line in swept:
                mine = here[here.line.eq(line) & here.k.gt(NO_K)]
                _curve(axes, mine.assign(x=mine.k), _style(selection, line), line.title)
            for guide in (line for line in selection.lines if line.model == "sparsemax"):
                support = mean_support(selection, dataset, guide)
                if support is None:
                    continue
                style = _style(selection, guide) | {"linestyle": "none"}
                axes.axvline(support, color=style["color"], linewidth=1, linestyle=":")
                point = here[here.line.eq(guide)]
                if len(point):
                    label = f"{guide.title} (mean support {support:.1f})"
                    spread = point["std"].fillna(0)
                    axes.errorbar([support], point.value, yerr=spread, **style, label=label)
            ks = sorted(set(of_swept.k[(of_swept.metric == column) & (of_swept.k > NO_K)]))
            ks = ks[:: -(-len(ks) // 5)]  # thinned where they would collide
            axes.set_xscale("log", base=2)
            axes.xaxis.set_minor_locator(NullLocator())
            axes.set_xticks(ks, [str(k) for k in ks])
            axes.set_title(column_title(column, selection.wanted.latents), fontsize=10, loc="left")
        for axes in panels[len(columns) :]:
            axes.set_visible(False)
        for axes in panels[max(0, len(columns) - 2) : len(columns)]:
            axes.set_xlabel("k")
        for axes in panels[::2]:
            axes.set_ylabel("accuracy, %")
        _legend(figure, panels[0])
    caption = (
        "A panel for each on_n. Dotted: the mean support of the Sparsemax SAE on this dataset, "
        f"which needs no k; the star is its accuracy.{_spread(cells)}"
    )
    return Plot(f"k_{slug(dataset)}", f"{dataset_title(dataset)}: accuracy over k", caption, figure)


def sparsity_plot(selection: Selection, dataset: str) -> Plot | None:
    """L0 against FVU, every model and k; None: nothing measured."""
    metrics = selection.metrics
    metrics = metrics[(metrics.dataset == dataset) & metrics.metric.isin(["l0", "fvu"])]
    wide = metrics.pivot(index=["line", "k"], columns="metric", values=["value", "std"])
    if not {("value", "l0"), ("value", "fvu")} <= set(wide.columns):
        return None
    wide = wide.dropna(subset=[("value", "l0"), ("value", "fvu")]).fillna(0)
    measured = set(wide.index.get_level_values("line"))
    shown = [line for line in selection.lines if line in measured]
    if not shown:
        return None
    wide = wide[wide.index.get_level_values("line").isin(shown)]
    with matplotlib.rc_context(STYLE):
        figure, (axes,) = _figure(3.2)
        above = True  # curves of k lie near each other: their labels take different sides
        for line in shown:
            style = _style(selection, line) | {"linestyle": "-", "linewidth": 1, "elinewidth": 1}
            points = wide.xs(line, level="line").sort_index()
            value, std = points["value"], points["std"]
            axes.errorbar(value.l0, value.fvu, xerr=std.l0, yerr=std.fvu, **style, label=line.title)
            swept = len(value) > 1  # one k is in the tables
            for k, point in value.iterrows() if swept else ():
                side: Any = {"xytext": (4, 4), "ha": "left", "va": "bottom"}
                if not above:
                    side = {"xytext": (-4, -4), "ha": "right", "va": "top"}
                xy = point.l0, point.fvu
                axes.annotate(f"k {k}", xy, textcoords="offset points", fontsize=8, **side)
            above ^= swept
        l0 = wide["value"].l0
        axes.set_xscale("log")
        axes.set_xlim(max(l0.min(), 1e-3) / 1.3, max(l0.max(), 1e-3) * 1.3)
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xlabel("L0: active latents per token")
        axes.set_ylabel("FVU")
        axes.set_ylim(bottom=0)
        _legend(figure, axes)
    title = f"{dataset_title(dataset)}: sparsity against FVU"
    caption = f"Lower left is better.{_spread(metrics)}"
    return Plot(f"sparsity_{slug(dataset)}", title, caption, figure)


def concept_areas(concepts: pd.DataFrame, by: str) -> pd.DataFrame:
    """AUROC [concept, variant], means over seeds; behind the variants the columns of `BESIDE` that
    were measured, means over all rows. Concepts and variants are in the order of the rows.

    Args:
        concepts: rows of one level, as `Collected` has them.
        by: the column that tells the variant.
    """
    table = concepts.groupby(["concept", by]).auroc.mean().unstack()
    table = table.loc[list(dict.fromkeys(concepts.concept)), list(dict.fromkeys(concepts[by]))]
    for name in BESIDE:
        values = concepts.get(f"auroc_{name}")
        if values is not None and values.notna().any():
            table[name] = values.groupby(concepts.concept).mean()
    return table.dropna(how="all")


def concept_map(areas: pd.DataFrame) -> Figure:
    """A heat map of `concept_areas` with titles of variants, a dot where a concept is found."""
    with matplotlib.rc_context(STYLE):
        figure, (axes,) = _figure(1.3 + 0.17 * len(areas))
        colours = matplotlib.colormaps["cividis"].with_extremes(bad="none")
        shade = axes.imshow(areas, cmap=colours, vmin=0.5, vmax=1, aspect="auto")
        for (y, x), value in np.ndenumerate(areas.to_numpy(dtype=float)):
            if value >= FOUND:
                axes.plot(x, y, "o", color=INK_ON_LIGHT, markersize=3)
        axes.set_yticks(range(len(areas)), list(areas.index), fontsize=8)
        many = areas.shape[1] > 10
        turned: Any = {"rotation": 90} if many else {"rotation": 35, "ha": "right"}
        axes.set_xticks(range(areas.shape[1]), list(areas), **turned)
        axes.grid(visible=False)
        variants = [name for name in areas if name not in BESIDE]
        if len(variants) < areas.shape[1]:
            axes.axvline(len(variants) - 0.5, color=INK, linewidth=1.5)
        figure.colorbar(shade, ax=axes, label="AUROC", fraction=0.05)
        _fixed(figure)
    return figure


def concept_means(
    selection: Selection, concepts: pd.DataFrame, dataset: str
) -> dict[str, pd.DataFrame]:
    """`concept_areas` of the selection's lines, by their titles, for each level.

    Args:
        concepts: of `Collected`.
    """
    of_line = selection.measured[selection.measured.dataset.eq(dataset)]
    of_line = of_line[of_line.tabled & of_line.line.isin(selection.lines)]
    of_line = of_line.drop_duplicates("folder").set_index("folder").line
    mine = concepts[concepts.folder.isin(of_line.index)]
    mine = mine.assign(line=mine.folder.map(of_line))
    found = {}
    for level, rows in mine.groupby("level", sort=False):
        areas = concept_areas(rows, "line")
        order = [line for line in selection.lines if line in areas]
        order += [name for name in BESIDE if name in areas]
        if not areas.empty:
            titles = {line: selection.title(line) for line in selection.lines}
            found[level] = areas[order].rename(columns=titles)
    return found


def concept_plots(selection: Selection, concepts: pd.DataFrame, dataset: str) -> list[Plot]:
    """Which variant recovers which concepts: the map of `concept_means` for each level."""
    found = []
    for level, areas in concept_means(selection, concepts, dataset).items():
        title = f"{dataset_title(dataset)}: concepts recovered, {level} level"
        name = f"concepts_{level}_{slug(dataset)}"
        caption = f"AUROC of each concept's latent, mean over seeds; {ON_THE_MAP}"
        found.append(Plot(name, title, caption, concept_map(areas)))
    return found


def noise_plot(table: Table) -> Plot | None:
    """The intraclass correlations of a noise table with their intervals; None: it is empty."""
    rows = table.rows[::-1]
    if not rows:
        return None
    icc, low, high = (
        [row.cells[key].ours or 0.0 for row in rows] for key in ("icc", "low", "high")
    )
    with matplotlib.rc_context(STYLE):
        figure, (axes,) = _figure(0.9 + 0.19 * len(rows))
        for y, row in enumerate(rows):
            tells = row.labels[1] == "yes"
            colour = model_style("relu", ())[0] if tells else model_style("attention_relu", ())[0]
            axes.plot([max(low[y], -1), min(high[y], 1)], [y, y], color=colour)
            fill = colour if tells else "none"
            axes.plot(icc[y], y, "o", color=colour, markerfacecolor=fill, markersize=5)
        axes.set_yticks(range(len(rows)), [row.labels[0] for row in rows], fontsize=8)
        axes.set_ylim(-0.7, len(rows) - 0.3)
        axes.set_xlim(-1.05, 1.05)
        axes.set_xlabel("intraclass correlation")
        _fixed(figure)
    caption = (
        "1: only the variants differ; 0: only the seeds. Filled: tells variants apart (F test, "
        "5 %). Lines: 95 % intervals, cut at -1."
    )
    return Plot(table.name, table.title, caption, figure)


def mean_support(selection: Selection, dataset: str, line: Line) -> float | None:
    """Mean number of active latents per token of a Sparsemax SAE, over seeds."""
    rows = selection.metrics
    rows = rows[rows.line.eq(line) & rows.dataset.eq(dataset) & rows.metric.eq("l0")]
    return float(rows.value.mean()) if len(rows) else None


def swept_k(rows: pd.DataFrame, line: Line) -> set[int]:
    """The values of k that a line has results of."""
    return set(rows.k[rows.line.eq(line)]) - {NO_K}


def _figure(height: float, rows: int = 1, columns: int = 1) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    return figure, list(figure.subplots(rows, columns, squeeze=False).flat)


def _style(selection: Selection, line: Line) -> dict[str, Any]:
    """A model's colour and marker; its lines but the first are dash-dotted, markers hollow."""
    colour, marker = model_style(line.model, selection.models)
    first = line == selection.main(line.model)
    return {
        "color": colour,
        "marker": marker,
        "markersize": 9 if marker == "*" else 5,
        "markerfacecolor": colour if first else "none",
        "linestyle": "-" if first else "-.",
    }


def _curve(axes: Axes, cells: pd.DataFrame, style: dict[str, Any], label: str) -> None:
    """A line through `value` over `x`, with a band of one standard deviation over seeds."""
    if cells.empty:
        return
    cells = cells.sort_values("x")
    axes.plot(cells.x, cells.value, **style, label=label)
    several = cells[cells.seeds > 1]
    if len(several):
        low, high = several.value - several["std"], several.value + several["std"]
        axes.fill_between(several.x, low, high, color=style["color"], alpha=0.18, linewidth=0)


def legend_below(figure: Figure, axes: Axes, columns: int) -> None:
    """What the marks of `axes` are, below the figure."""
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=columns)


def _legend(figure: Figure, axes: Axes) -> None:
    """The legend below, in fewer columns where a label is long."""
    labels = axes.get_legend_handles_labels()[1]
    legend_below(figure, axes, 1 if max(map(len, labels), default=0) > 30 else 3)
    _fixed(figure)


def _fixed(figure: Figure) -> None:
    """The layout stays: or it would be found again for every file."""
    figure.draw_without_rendering()
    figure.set_layout_engine("none")


def _spread(cells: pd.DataFrame) -> str:
    several = (cells.seeds > 1).any() if len(cells) else False
    return " Bands and bars: one standard deviation over seeds." if several else ""

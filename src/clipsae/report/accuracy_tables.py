"""Tables 7-17, their average, ranks and fidelity."""

import statistics
from collections.abc import Iterable
from dataclasses import dataclass, replace

import pandas as pd

from clipsae.evaluation.metrics.fidelity import fidelity
from clipsae.report import published
from clipsae.report.collect import NO_K
from clipsae.report.names import column_order, column_title, dataset_title, model_title, slug
from clipsae.report.select import Selection
from clipsae.report.table import Cell, Column, Row, Table
from clipsae.report.variants import Line

PAPER_COLUMNS = ("no_sae", "on_1", "on_5", "on_10", "on_50", "on_all")
_MEANING = {
    "paper": "latents counted on the evaluated images themselves",
    "heldout": "latents counted on the training split",
}


def dataset_table(selection: Selection, dataset: str) -> Table:
    """One of Tables 7-17, or the like for a dataset that the paper does not have."""
    columns = accuracy_columns(selection, [dataset])
    title = dataset_title(dataset)
    number = published.table_numbers().get(dataset)
    name = f"table_{number:02d}_{slug(dataset)}" if number else f"accuracy_{slug(dataset)}"
    return Table(
        name=name,
        title=f"Table {number}: {title}" if number else f"{title}: accuracy",
        caption=(
            "Macro accuracy in percent. on_n keeps the n latents of the image's own class "
            f"({_MEANING.get(selection.wanted.protocol, selection.wanted.protocol)}), "
            f"on_{selection.wanted.latents} all of them; no_sae is CLIP alone."
            + _images(selection, dataset)
        ),
        heads=("model",),
        columns=plain_columns(selection, columns),
        rows=_rows(selection, dataset, columns),
    )


def other_settings_table(selection: Selection, dataset: str) -> Table:
    """off_n and self_n of one dataset, which the paper does not tabulate."""
    columns = sorted(
        {
            column
            for line in selection.lines
            for column in selection.of(line, dataset).column
            if column.startswith(("off_", "self_"))
        },
        key=column_order,
    )
    return Table(
        name=f"settings_{slug(dataset)}",
        title=f"{dataset_title(dataset)}: without the class's latents, and without labels",
        caption=(
            "Macro accuracy in percent, ours only. off_n keeps all but the n latents of the "
            "image's class (lower: those n carried more); self_n keeps the n latents that are "
            "most active in the image itself, and uses no label."
        ),
        heads=("model",),
        columns=tuple(
            Column(c, column_title(c, selection.wanted.latents), best=_off_is_low(c))
            for c in columns
        ),
        rows=_rows(selection, dataset, columns),
    )


def average_table(selection: Selection, datasets: tuple[str, ...], name: str, of: str) -> Table:
    """Mean over datasets; published figures over the same datasets as ours.

    Args:
        of: how the datasets are called, such as "the eleven datasets".
    """
    columns = accuracy_columns(selection, datasets)
    rows, over = [], set()
    for line in selection.shown(selection.cells[selection.cells.dataset.isin(datasets)]):
        cells = {column: average(selection, line, datasets, column) for column in columns}
        counted = selection.of(line)
        on = frozenset(counted.dataset[counted.dataset.isin(datasets)])
        cells["datasets"] = Cell(float(len(on)))
        rows.append(Row((row_title(selection, line),), cells, line.model))
        over |= {on} if on else set()
    alike = len(over) <= 1
    return Table(
        name=name,
        title=f"Average over {of}",
        caption=(
            "Mean macro accuracy in percent over the datasets that a row has results on, whose "
            "number is in the last column."
            + ("" if alike else " Rows over different datasets cannot be compared: no best is set.")
            + _published_mean(datasets)
        ),
        heads=("model",),
        columns=(
            *(c if alike else replace(c, best="") for c in plain_columns(selection, columns)),
            Column("datasets", f"of {len(datasets)}", 0, ""),
        ),
        rows=tuple(rows),
    )


def average(selection: Selection, line: Line, datasets: tuple[str, ...], column: str) -> Cell:
    """Mean of a column over the datasets with results, and of the published over the same."""
    cells = selection.of(line)
    cells = cells[(cells.column == column) & cells.dataset.isin(datasets)]
    known = published.zero_shot()
    over = list(cells.dataset) or list(datasets)
    keys = [(d, line.model, column) for d in over]
    figures = [float(known[key]) for key in keys if key in known]
    mean = statistics.fmean(figures) if figures and len(figures) == len(over) else None
    runs = selection.rows(selection.runs, line)
    runs = runs[(runs.column == column) & runs.dataset.isin(datasets)]
    by_seed = runs.pivot(index="seed", columns="dataset", values="accuracy").dropna()
    several = len(by_seed) > 1 and column != "no_sae"
    return Cell(
        ours=float(cells.accuracy.mean()) if len(cells) else None,
        std=float(by_seed.mean(axis=1).std()) if several else None,
        seeds=len(by_seed) if several else 0,
        published=mean,
        printed="" if mean is None else f"{mean:.3f}",
    )


@dataclass(frozen=True)
class Compared:
    """Lines that can be compared, over the datasets that all of them have.

    Attributes:
        group: what they have in common and others have not; "": nothing sets them apart.
        lines: at least two.
        datasets: with results of all.
        left_out: lines with results on fewer of these datasets, and on how many.
    """

    group: str
    lines: tuple[Line, ...]
    datasets: tuple[str, ...]
    left_out: dict[Line, int]


def compared(selection: Selection, datasets: tuple[str, ...]) -> list[Compared]:
    """What can be compared of each group of alike results.

    The lines with results on most datasets are taken, as many of them as make the largest table of
    lines by datasets without a gap: a model with one dataset takes the others' away from nobody.
    """
    found = []
    for label, lines in selection.groups:
        has = {line: set(selection.of(line).dataset) & set(datasets) for line in lines}
        ordered = sorted((x for x in lines if has[x]), key=lambda line: -len(has[line]))
        tables = {n: set.intersection(*(has[x] for x in ordered[:n])) for n in _from_two(ordered)}
        if not tables:
            continue
        best = max(tables, key=lambda n: (n * len(tables[n]), n))
        over = tuple(name for name in datasets if name in tables[best])
        chosen = tuple(line for line in lines if set(over) <= has[line] and line in ordered)
        left_out = {x: len(has[x] & set(over)) for x in ordered if x not in chosen}
        if over:
            found.append(Compared(label, chosen, over, left_out))
    return found


def _from_two(lines: list[Line]) -> range:
    return range(2, len(lines) + 1)


def rank_table(selection: Selection, of: Compared, name: str) -> Table:
    """Mean rank of the models for each n, ours and published, over the same datasets."""
    columns = [c for c in accuracy_columns(selection, of.datasets) if c != "no_sae"]
    rows: dict[Line, dict[str, Cell]] = {line: {} for line in of.lines}
    counts = []
    for column in columns:
        ours = pivot(selection, of.lines, of.datasets, column)
        counts.append(len(ours))
        theirs = published_pivot(of.lines, list(ours.index), column)
        mean = ours.rank(axis=1, ascending=False).mean()
        their_mean = theirs.rank(axis=1, ascending=False).mean()
        for line in of.lines:
            rank = their_mean.get(line)
            rows[line][column] = Cell(
                ours=None if ours.empty else float(mean[line]),
                published=None if rank is None else float(rank),
                printed="" if rank is None else f"{rank:.2f}",
            )
    listed = ", ".join(dataset_title(dataset) for dataset in of.datasets)
    fewer = ""
    if min(counts, default=0) < len(of.datasets):
        fewer = f" Some columns have figures on {min(counts, default=0)} of them."
    if of.left_out:
        absent = (f"{row_title(selection, line)} ({n})" for line, n in of.left_out.items())
        fewer += f" Left out, with results on fewer of these datasets: {', '.join(absent)}."
    return Table(
        name=name,
        title=f"Mean rank over {len(of.datasets)} datasets" + (f": {of.group}" if of.group else ""),
        caption=(
            f"1 is the best of {len(of.lines)}; ties share their mean rank. The datasets are those "
            f"that all of them have results on: {listed}.{fewer} Published ranks, where there are "
            "any, are among the same models and datasets."
        ),
        heads=("model",),
        columns=tuple(
            Column(c, column_title(c, selection.wanted.latents), best="min") for c in columns
        ),
        rows=tuple(Row((row_title(selection, x),), rows[x], x.model) for x in of.lines),
    )


def fidelity_table(selection: Selection) -> Table:
    """(on_M - chance) / (no_sae - chance) of every dataset and model."""
    lines = selection.shown(selection.cells)
    rows = []
    for dataset in selection.datasets:
        cells = {}
        for line in lines:
            of = selection.of(line, dataset).set_index("column")
            if {"no_sae", "on_all"} <= set(of.index):
                chance = 100 / float(of.competing["on_all"])
                value = fidelity(of.accuracy["on_all"], of.accuracy["no_sae"], chance)
                cells[row_title(selection, line)] = Cell(float(value)) if value == value else Cell()
        rows.append(Row((dataset_title(dataset),), cells))
    titles = [row_title(selection, line) for line in lines]
    return Table(
        name="fidelity",
        title="Fidelity of the reconstruction",
        caption=(
            f"(on_{selection.wanted.latents} - chance) / (no_sae - chance): the share of CLIP's "
            "accuracy above guessing that is left when every token is replaced by its "
            "reconstruction. Ours only."
        ),
        heads=("dataset",),
        columns=tuple(Column(title, title, 3, "") for title in titles),
        rows=tuple(rows),
    )


def accuracy_columns(selection: Selection, datasets: Iterable[str]) -> list[str]:
    """no_sae and on_n: all that were evaluated, and the paper's where it has a dataset or
    nothing was."""
    cells = selection.cells[
        selection.cells.dataset.isin(list(datasets)) & selection.cells.model.isin(selection.models)
    ]
    found = {c for c in cells.column if c == "no_sae" or c.startswith("on_")}
    if not found or any(name in published.table_numbers() for name in datasets):
        found |= set(PAPER_COLUMNS)
    return sorted(found, key=column_order)


def row_title(selection: Selection, line: Line) -> str:
    """A model's title, with its k where it has one, and what sets its line apart."""
    k = selection.k.get(line, NO_K)
    title = model_title(line.model) + (f" (k = {k})" if k != NO_K else "")
    return f"{title}, {line.variant}" if line.variant else title


def plain_columns(selection: Selection, columns: Iterable[str]) -> tuple[Column, ...]:
    """Columns of accuracies: higher is better, but for CLIP alone."""
    return tuple(
        Column(c, column_title(c, selection.wanted.latents), best="" if c == "no_sae" else "max")
        for c in columns
    )


def _published_mean(datasets: Iterable[str]) -> str:
    if not set(datasets) & set(published.table_numbers()):
        return ""
    return " The published mean is over the same datasets, or over all where there are none."


def _off_is_low(column: str) -> str:
    return "min" if column.startswith("off_") else "max"


def _rows(selection: Selection, dataset: str, columns: list[str]) -> tuple[Row, ...]:
    """A row a line."""
    cells = selection.cells[
        selection.cells.dataset.eq(dataset) & selection.cells.column.isin(columns)
    ]
    return tuple(
        Row(
            (row_title(selection, line),),
            {c: _cell(selection, line, dataset, c) for c in columns},
            line.model,
        )
        for line in selection.shown(cells)
    )


def _cell(selection: Selection, line: Line, dataset: str, column: str) -> Cell:
    of = selection.of(line, dataset).set_index("column")
    return joined(of, column, published.zero_shot().get((dataset, line.model, column)))


def joined(of: pd.DataFrame, column: str, printed: str | None) -> Cell:
    """Ours from cells indexed by column, and the published figure as printed."""
    theirs = {} if printed is None else {"published": float(printed), "printed": printed}
    if column not in of.index:
        return Cell(**theirs)
    row = of.loc[column]
    if row.accuracy != row.accuracy:
        return Cell(**theirs)
    if column == "no_sae":  # CLIP alone: seeds change nothing
        return Cell(float(row.accuracy), **theirs)
    std = float(row["std"]) if row.seeds > 1 else None
    return Cell(float(row.accuracy), std, int(row.seeds), **theirs)


def pivot(
    selection: Selection, lines: tuple[Line, ...], datasets: Iterable[str], column: str
) -> pd.DataFrame:
    """Accuracy [dataset, line], datasets with a gap left out."""
    series = {}
    for line in lines:
        of = selection.of(line)
        of = of[(of.column == column) & of.dataset.isin(list(datasets))]
        series[line] = of.set_index("dataset").accuracy
    return pd.DataFrame(series, columns=list(lines)).dropna()


def published_pivot(lines: tuple[Line, ...], datasets: list[str], column: str) -> pd.DataFrame:
    """The like of the paper's figures; empty where one of them is missing, or a model has several
    lines."""
    known = published.zero_shot()
    rows = {
        d: {x: float(known[d, x.model, column]) for x in lines}
        for d in datasets
        if all((d, x.model, column) in known for x in lines)
    }
    whole = len(rows) == len(datasets) and len({x.model for x in lines}) == len(lines)
    return pd.DataFrame.from_dict(rows, orient="index") if whole else pd.DataFrame()


def _images(selection: Selection, dataset: str) -> str:
    """How many images and classes our figures rest on, as a sentence."""
    of = selection.cells[selection.cells.dataset == dataset]
    if of.empty:
        return ""
    images = sorted({int(n) for n in of.images})
    counts = f"{images[0]:,}" if len(images) == 1 else f"{images[0]:,} to {images[-1]:,}"
    classes = counted_classes(int(of.classes.max()), int(of.competing.max()))
    return f" Ours: {counts} images, {classes}."


def counted_classes(present: int, competing: int) -> str:
    """Such as "5 classes", or "5 of 1,000 classes" where some that compete have no images."""
    of = f" of {competing:,}" if competing > present else ""
    return f"{present:,}{of} classes"

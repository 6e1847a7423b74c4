"""Tables 7-17, their average, ranks and fidelity."""

import statistics
from collections.abc import Iterable

import pandas as pd

from clipsae.evaluation.metrics.fidelity import fidelity
from clipsae.report import published
from clipsae.report.collect import NO_K
from clipsae.report.names import column_order, column_title, dataset_title, model_title, slug
from clipsae.report.select import Selection
from clipsae.report.table import Cell, Column, Row, Table

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
            for model in selection.models
            for column in selection.of(model, dataset).column
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
    rows = []
    for model in selection.models:
        cells = {column: average(selection, model, datasets, column) for column in columns}
        counted = selection.of(model)
        count = counted[counted.dataset.isin(datasets)].dataset.nunique()
        cells["datasets"] = Cell(float(count))
        rows.append(Row((row_title(selection, model),), cells, model))
    return Table(
        name=name,
        title=f"Average over {of}",
        caption=(
            "Mean macro accuracy in percent over the datasets that a model has results on. Compare "
            f"models only where they have the same datasets.{_published_mean(datasets)}"
        ),
        heads=("model",),
        columns=(
            *plain_columns(selection, columns),
            Column("datasets", f"of {len(datasets)}", 0, ""),
        ),
        rows=tuple(rows),
    )


def average(selection: Selection, model: str, datasets: tuple[str, ...], column: str) -> Cell:
    """Mean of a column over the datasets with results, and of the published over the same."""
    cells = selection.of(model)
    cells = cells[(cells.column == column) & cells.dataset.isin(datasets)]
    known = published.zero_shot()
    over = list(cells.dataset) or list(datasets)
    figures = [float(known[d, model, column]) for d in over if (d, model, column) in known]
    mean = statistics.fmean(figures) if figures and len(figures) == len(over) else None
    runs = selection.runs
    runs = runs[
        (runs.model == model)
        & (runs.k == selection.k[model])
        & (runs.column == column)
        & runs.dataset.isin(datasets)
    ]
    by_seed = runs.pivot(index="seed", columns="dataset", values="accuracy").dropna()
    several = len(by_seed) > 1 and column != "no_sae"
    return Cell(
        ours=float(cells.accuracy.mean()) if len(cells) else None,
        std=float(by_seed.mean(axis=1).std()) if several else None,
        seeds=len(by_seed) if several else 0,
        published=mean,
        printed="" if mean is None else f"{mean:.3f}",
    )


def rank_table(selection: Selection, datasets: tuple[str, ...], name: str, of: str) -> Table:
    """Mean rank of the models for each n, ours and published, over the same datasets."""
    present = tuple(m for m in selection.models if selection.of(m).dataset.isin(datasets).any())
    columns = [c for c in accuracy_columns(selection, datasets) if c != "no_sae"]
    rows: dict[str, dict[str, Cell]] = {model: {} for model in present}
    counts = []
    for column in columns:
        ours = pivot(selection, present, datasets, column)
        counts.append(len(ours))
        theirs = published_pivot(present, list(ours.index), column)
        mean = ours.rank(axis=1, ascending=False).mean()
        their_mean = theirs.rank(axis=1, ascending=False).mean()
        for model in present:
            rank = their_mean.get(model)
            rows[model][column] = Cell(
                ours=None if ours.empty else float(mean[model]),
                published=None if rank is None else float(rank),
                printed="" if rank is None else f"{rank:.2f}",
            )
    fewest, most = min(counts, default=0), max(counts, default=0)
    over = f"{fewest}" if fewest == most else f"{fewest} to {most}"
    return Table(
        name=name,
        title=f"Mean rank over {of}",
        caption=(
            f"1 is the best of {len(present)} models; ties share their mean rank. Over the {over} "
            "datasets where all of them have the figure; published ranks, where there are any, "
            "are among the same models and datasets."
        ),
        heads=("model",),
        columns=tuple(
            Column(c, column_title(c, selection.wanted.latents), best="min") for c in columns
        ),
        rows=tuple(Row((row_title(selection, m),), rows[m], m) for m in present),
    )


def fidelity_table(selection: Selection) -> Table:
    """(on_M - chance) / (no_sae - chance) of every dataset and model."""
    rows = []
    for dataset in selection.datasets:
        cells = {}
        for model in selection.models:
            of = selection.of(model, dataset).set_index("column")
            if {"no_sae", "on_all"} <= set(of.index):
                chance = 100 / float(of.classes["on_all"])
                value = fidelity(of.accuracy["on_all"], of.accuracy["no_sae"], chance)
                cells[model] = Cell(float(value)) if value == value else Cell()
        rows.append(Row((dataset_title(dataset),), cells))
    return Table(
        name="fidelity",
        title="Fidelity of the reconstruction",
        caption=(
            f"(on_{selection.wanted.latents} - chance) / (no_sae - chance): the share of CLIP's "
            "accuracy above guessing that is left when every token is replaced by its "
            "reconstruction. Ours only."
        ),
        heads=("dataset",),
        columns=tuple(Column(m, row_title(selection, m), 3, "") for m in selection.models),
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


def row_title(selection: Selection, model: str) -> str:
    """A model's title, with its k where it has one."""
    k = selection.k[model]
    return model_title(model) + (f" (k = {k})" if k != NO_K else "")


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
    """A row a model."""
    return tuple(
        Row(
            (row_title(selection, model),),
            {c: _cell(selection, model, dataset, c) for c in columns},
            model,
        )
        for model in selection.models
    )


def _cell(selection: Selection, model: str, dataset: str, column: str) -> Cell:
    of = selection.of(model, dataset).set_index("column")
    return joined(of, column, published.zero_shot().get((dataset, model, column)))


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
    selection: Selection, models: tuple[str, ...], datasets: tuple[str, ...], column: str
) -> pd.DataFrame:
    """Accuracy [dataset, model], datasets with a gap left out."""
    series = {}
    for model in models:
        of = selection.of(model)
        of = of[(of.column == column) & of.dataset.isin(datasets)]
        series[model] = of.set_index("dataset").accuracy
    return pd.DataFrame(series, columns=list(models)).dropna()


def published_pivot(models: tuple[str, ...], datasets: list[str], column: str) -> pd.DataFrame:
    """The like of the paper's figures; empty where one of them is missing."""
    known = published.zero_shot()
    rows = {
        d: {m: float(known[d, m, column]) for m in models}
        for d in datasets
        if all((d, m, column) in known for m in models)
    }
    return (
        pd.DataFrame.from_dict(rows, orient="index")
        if len(rows) == len(datasets)
        else pd.DataFrame()
    )


def _images(selection: Selection, dataset: str) -> str:
    """How many images and classes our figures rest on, as a sentence."""
    of = selection.cells[selection.cells.dataset == dataset]
    if of.empty:
        return ""
    images = sorted({int(n) for n in of.images})
    counts = f"{images[0]:,}" if len(images) == 1 else f"{images[0]:,} to {images[-1]:,}"
    return f" Ours: {counts} images, {int(of.classes.max()):,} classes."

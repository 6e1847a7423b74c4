"""The tables: accuracies (Tables 7-17), their average and ranks, fidelity, the ablation, metrics
(Tables 5 and 6, concepts found) and seed stability."""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import pandas as pd

from clipsae.evaluation.metrics import NUMBERS
from clipsae.evaluation.metrics.fidelity import fidelity
from clipsae.evaluation.numbers import Number
from clipsae.report import published
from clipsae.report.collect import NO_K
from clipsae.report.names import (
    SIX,
    column_order,
    column_title,
    dataset_title,
    model_title,
    slug,
)
from clipsae.report.select import Selection
from clipsae.report.stability import Stability
from clipsae.report.table import Cell, Column, Row, Table
from clipsae.report.variants import Line

PAPER_COLUMNS = ("no_sae", "on_1", "on_5", "on_10", "on_50", "on_all")
MEASURED_ON = "imagenet"  # our reading of Tables 5 and 6, which do not say it
_COUNTED = {
    "paper": "latents counted on the evaluated images themselves",
    "heldout": "latents counted on the training split",
}
_WHICH_CODE = (
    "The published zero fractions of TopK and BatchTopK (0.966, 0.814) are far from k = 32 of "
    "49,152 (0.9993): presumably the paper counted this code for them. Both tables show the "
    "published values. "
)


def row_title(selection: Selection, line: Line) -> str:
    """A model's title, with its k where it has one, and what sets its line apart."""
    k = selection.k.get(line, NO_K)
    title = model_title(line.model) + (f" (k = {k})" if k != NO_K else "")
    return f"{title}, {line.variant}" if line.variant else title


def _row(
    selection: Selection,
    line: Line,
    figures: pd.DataFrame,
    keys: Iterable[str],
    known: Mapping[tuple[str, str], str],
    *labels: str,
) -> Row:
    """A line's figures, of those of one dataset, beside the published ones by model and key."""
    ours = selection.rows(figures, line).set_index("metric")
    cells = {}
    for key in keys:
        printed = known.get((line.model, key.removesuffix("_dense")), "")
        cell = Cell(published=float(printed), printed=printed) if printed else Cell()
        if key in ours.index and not pd.isna(ours.value[key]):
            cell = replace(cell, ours=float(ours.value[key]))
            if key != "no_sae":  # CLIP alone: seeds change nothing
                seeds = int(ours.seeds[key])
                cell = replace(
                    cell, std=float(ours["std"][key]) if seeds > 1 else None, seeds=seeds
                )
        cells[key] = cell
    return Row((row_title(selection, line), *labels), cells, line.model)


def _rows(
    selection: Selection,
    figures: pd.DataFrame,
    keys: Sequence[str],
    known: Mapping[tuple[str, str], str],
) -> tuple[Row, ...]:
    """A row a line, of a part of `cells` or `metrics`."""
    lines = selection.shown(figures[figures.metric.isin(keys)])
    return tuple(_row(selection, line, figures, keys, known) for line in lines)


def accuracy_columns(selection: Selection, datasets: Iterable[str]) -> list[str]:
    """no_sae and on_n: all that were evaluated, and the paper's where it has a dataset or
    nothing was."""
    datasets = list(datasets)
    cells = selection.cells
    cells = cells[cells.dataset.isin(datasets) & cells.model.isin(selection.models)]
    found = {c for c in cells.metric if c == "no_sae" or c.startswith("on_")}
    if not found or set(datasets) & set(published.table_numbers()):
        found |= set(PAPER_COLUMNS)
    return sorted(found, key=column_order)


def _columns(selection: Selection, keys: Iterable[str], best: str = "max") -> tuple[Column, ...]:
    """Columns of accuracies: higher is better, but for CLIP alone and without the latents."""
    ends = {"no_sae": "", "off": "min"}
    return tuple(
        Column(
            key,
            column_title(key, selection.wanted.latents),
            best=ends.get(key, ends.get(key.partition("_")[0], best)),
        )
        for key in keys
    )


def dataset_table(selection: Selection, dataset: str) -> Table:
    """One of Tables 7-17, or its counterpart for a dataset that the paper does not have."""
    keys = accuracy_columns(selection, [dataset])
    title, number = dataset_title(dataset), published.table_numbers().get(dataset)
    protocol = selection.wanted.protocol
    cells = selection.cells[selection.cells.dataset == dataset]
    known = {(m, key): v for (d, m, key), v in published.zero_shot().items() if d == dataset}
    return Table(
        name=f"table_{number:02d}_{slug(dataset)}" if number else f"accuracy_{slug(dataset)}",
        title=f"Table {number}: {title}" if number else f"{title}: accuracy",
        caption=(
            "Macro accuracy in percent. on_n keeps the n latents of the image's own class "
            f"({_COUNTED.get(protocol, protocol)}), on_{selection.wanted.latents} all of them; "
            f"no_sae is CLIP alone.{_images(cells)}"
        ),
        heads=("model",),
        columns=_columns(selection, keys),
        rows=_rows(selection, cells, keys, known),
    )


def _images(cells: pd.DataFrame) -> str:
    """How many images and classes the figures rest on: "5 of 1,000 classes" where some that compete
    have no images."""
    if cells.empty:
        return ""
    low, high = int(cells.images.min()), int(cells.images.max())
    present, competing = int(cells.classes.max()), int(cells.competing.max())
    images = f"{low:,}" if low == high else f"{low:,} to {high:,}"
    classes = f"{present:,} of {competing:,}" if competing > present else f"{present:,}"
    return f" Ours: {images} images, {classes} classes."


def other_settings_table(selection: Selection, dataset: str) -> Table:
    """off_n and self_n of one dataset, which the paper does not tabulate."""
    cells = selection.cells[selection.cells.dataset == dataset]
    there = {key for line in selection.lines for key in selection.of(line, dataset).metric}
    keys = sorted((k for k in there if k.startswith(("off_", "self_"))), key=column_order)
    return Table(
        name=f"settings_{slug(dataset)}",
        title=f"{dataset_title(dataset)}: without the class's latents, and without labels",
        caption=(
            "Macro accuracy in percent, ours only. off_n keeps all but the n latents of the "
            "image's class (lower: those n carried more); self_n keeps the n latents that are "
            "most active in the image itself and uses no label."
        ),
        heads=("model",),
        columns=_columns(selection, keys),
        rows=_rows(selection, cells, keys, {}),
    )


def average_table(selection: Selection, datasets: tuple[str, ...], name: str, title: str) -> Table:
    """Mean over datasets; published figures over the same datasets as ours."""
    keys = accuracy_columns(selection, datasets)
    rows, over = [], set()
    for line in selection.shown(selection.cells[selection.cells.dataset.isin(datasets)]):
        there = frozenset(selection.of(line).dataset) & frozenset(datasets)
        cells = {key: _average(selection, line, datasets, key) for key in keys}
        cells["datasets"] = Cell(float(len(there)))
        rows.append(Row((row_title(selection, line),), cells, line.model))
        over |= {there} if there else set()
    caption = (
        "Mean macro accuracy in percent over the datasets that a row has results for; their "
        "number is in the last column."
    )
    if len(over) > 1:
        caption += " Rows over different datasets are not comparable: no best is marked."
    if set(datasets) & set(published.table_numbers()):
        caption += " Published means are over the same datasets, or over all where we have none."
    columns = _columns(selection, keys)
    if len(over) > 1:
        columns = tuple(replace(column, best="") for column in columns)
    return Table(
        name=name,
        title=f"Average over {title}",
        caption=caption,
        heads=("model",),
        columns=(*columns, Column("datasets", f"of {len(datasets)}", 0, "")),
        rows=tuple(rows),
    )


def _average(selection: Selection, line: Line, datasets: tuple[str, ...], key: str) -> Cell:
    """Mean over the datasets with results, and of the published figures over the same; the spread
    is that of the seeds' averages."""
    cells = selection.of(line)
    cells = cells[(cells.metric == key) & cells.dataset.isin(datasets)]
    known = published.zero_shot()
    figures = [known.get((d, line.model, key)) for d in list(cells.dataset) or datasets]
    mean = statistics.fmean(map(float, figures)) if None not in figures else None
    runs = selection.rows(selection.runs, line)
    runs = runs[(runs.metric == key) & runs.dataset.isin(datasets)]
    by_seed = runs.pivot(index="seed", columns="dataset", values="value").dropna()
    several = len(by_seed) > 1 and key != "no_sae"
    return Cell(
        ours=float(cells.value.mean()) if len(cells) else None,
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
    """What can be compared within each group of results with the same settings.

    The lines with results on most datasets are taken, as many of them as make the largest table of
    lines by datasets without a gap: a model with one dataset does not cost the others theirs.
    """
    found = []
    for label, lines in selection.groups:
        has = {line: set(selection.of(line).dataset) & set(datasets) for line in lines}
        ordered = sorted((x for x in lines if has[x]), key=lambda line: -len(has[line]))
        shared = {
            n: set.intersection(*(has[line] for line in ordered[:n]))
            for n in range(2, len(ordered) + 1)
        }
        best = max(shared, key=lambda n: (n * len(shared[n]), n), default=0)
        over = tuple(name for name in datasets if best and name in shared[best])
        if over:
            chosen = tuple(line for line in lines if set(over) <= has[line])
            left_out = {x: len(has[x] & set(over)) for x in ordered if x not in chosen}
            found.append(Compared(label, chosen, over, left_out))
    return found


def rank_table(selection: Selection, group: Compared, name: str) -> Table:
    """Mean rank of the models for each n, ours and published, over the same datasets."""
    keys = [c for c in accuracy_columns(selection, group.datasets) if c != "no_sae"]
    rows: dict[Line, dict[str, Cell]] = {line: {} for line in group.lines}
    counts = []
    for key in keys:
        ours = pivot(selection.cells, selection, group, key)
        theirs = published_pivot(group.lines, ours.index, key)
        counts.append(len(ours))
        mean, published_mean = (f.rank(axis=1, ascending=False).mean() for f in (ours, theirs))
        for line in group.lines:
            rank = published_mean.get(line)
            rows[line][key] = Cell(
                ours=None if ours.empty else float(mean[line]),
                published=None if rank is None else float(rank),
                printed="" if rank is None else f"{rank:.2f}",
            )
    listed, fewest = ", ".join(map(dataset_title, group.datasets)), min(counts, default=0)
    fewer = f" Some columns have figures for {fewest} of them." * (fewest < len(group.datasets))
    if group.left_out:
        absent = (f"{row_title(selection, line)} ({n})" for line, n in group.left_out.items())
        fewer += f" Excluded, with results for fewer of these datasets: {', '.join(absent)}."
    return Table(
        name=name,
        title=f"Mean rank over {len(group.datasets)} datasets"
        + (f": {group.group}" if group.group else ""),
        caption=(
            f"1 is the best of {len(group.lines)}; ties share their mean rank. Over the datasets "
            f"that all of them have results for: {listed}.{fewer} Published ranks, where there are "
            "any, are among the same models and datasets."
        ),
        heads=("model",),
        columns=_columns(selection, keys, best="min"),
        rows=tuple(Row((row_title(selection, x),), rows[x], x.model) for x in group.lines),
    )


def pivot(frame: pd.DataFrame, selection: Selection, group: Compared, key: str) -> pd.DataFrame:
    """Values of `cells` or `metrics` [dataset, line], datasets with a gap left out."""
    frame = frame[(frame.metric == key) & frame.dataset.isin(group.datasets)]
    series = {x: selection.rows(frame, x).set_index("dataset").value for x in group.lines}
    return pd.DataFrame(series, columns=list(group.lines)).dropna()


def published_pivot(lines: tuple[Line, ...], datasets: Iterable[str], key: str) -> pd.DataFrame:
    """The paper's counterpart; empty where a figure is missing or a model has several lines."""
    known = published.zero_shot()
    rows = {d: {x: float(known.get((d, x.model, key), "nan")) for x in lines} for d in datasets}
    frame = pd.DataFrame.from_dict(rows, orient="index", dtype=float)
    alone = len({x.model for x in lines}) == len(lines)
    return frame if alone and not frame.isna().any(axis=None) else pd.DataFrame()


def fidelity_table(selection: Selection) -> Table:
    """(on_M - chance) / (no_sae - chance) of every dataset and model."""
    lines = selection.shown(selection.cells)
    rows = []
    for dataset in selection.datasets:
        cells = {}
        for line in lines:
            figures = selection.of(line, dataset).set_index("metric")
            if {"no_sae", "on_all"} <= set(figures.index):
                chance = 100 / float(figures.competing["on_all"])
                value = fidelity(figures.value["on_all"], figures.value["no_sae"], chance)
                cells[row_title(selection, line)] = Cell(None if pd.isna(value) else float(value))
        rows.append(Row((dataset_title(dataset),), cells))
    return Table(
        name="fidelity",
        title="Fidelity of the reconstruction",
        caption=(
            f"(on_{selection.wanted.latents} - chance) / (no_sae - chance): the share of CLIP's "
            "accuracy above chance that is left when every token is replaced by its "
            "reconstruction. Ours only."
        ),
        heads=("dataset",),
        columns=tuple(Column(t, t, 3, "") for t in (row_title(selection, x) for x in lines)),
        rows=tuple(rows),
    )


def ablation_tables(selection: Selection) -> list[Table]:
    """The 2 x 2 ablation, architecture x activation: on ImageNet with the eleven datasets, and
    wherever there are results of its two mixed models."""
    parts = published.ablation_parts()
    found = set(selection.cells.dataset[selection.cells.model.isin(set(parts) - set(SIX))])
    if selection.wanted.models is None:
        found |= {published.ABLATED_ON} & set(selection.eleven)
    return [
        ablation_table(selection, dataset) for dataset in selection.datasets if dataset in found
    ]


def ablation_table(selection: Selection, dataset: str) -> Table:
    """Architecture x activation on one dataset; published for ImageNet."""
    known = published.ablation() if dataset == published.ABLATED_ON else {}
    keys, parts = PAPER_COLUMNS[1:5], published.ablation_parts()
    rows = [
        _row(selection, line, cells, keys, known, *parts[line.model])
        for line in selection.ablated
        if len(cells := selection.of(line, dataset)) or line == selection.main(line.model)
    ]
    return Table(
        name=f"ablation_{slug(dataset)}",
        title=f"Ablation of architecture and activation: {dataset_title(dataset)}",
        caption="Macro accuracy in percent."
        + " Published: the ablation's own figures for the mixed models, Table 12 for the others."
        * bool(known),
        heads=("model", "architecture", "activation"),
        columns=_columns(selection, keys),
        rows=tuple(sorted(rows, key=lambda row: (row.labels[1] != "linear", row.labels[2]))),
    )


def _metric_table(
    selection: Selection,
    figures: pd.DataFrame,
    numbers: Iterable[Number],
    name: str,
    title: str,
    caption: str,
    paper: bool = False,
) -> Table:
    """A table of the numbers that are there, and with `paper` those that the paper has.

    Args:
        caption: {} stands for what the numbers are.
    """
    there = set(figures.metric)
    numbers = [n for n in numbers if n.key in there or (paper and n.paper)]
    # Of several levels of one number the first says it.
    meanings = {n.label.partition(", ")[0]: n.meaning for n in numbers if n.meaning}
    return Table(
        name=name,
        title=title,
        caption=caption.replace("{}", " ".join(f"{x}: {said}." for x, said in meanings.items())),
        heads=("model",),
        columns=tuple(Column(n.key, n.label, n.digits, n.better) for n in numbers),
        rows=_rows(
            selection, figures, [n.key for n in numbers], published.metrics() if paper else {}
        ),
    )


def sparsity_tables(selection: Selection, dataset: str) -> list[Table]:
    """Table 5 of one dataset: of the codes as selected, and of the code without its selection."""
    paper = dataset == MEASURED_ON
    label = "Table 5" if paper else "As Table 5"
    name = "table_05" if paper else f"sparsity_{slug(dataset)}"
    also = " Published: on data that the paper does not name." if paper else ""
    figures = _without_encoder(selection, dataset)
    numbers = [n for n in NUMBERS if n.table == "sparsity"]
    selected = _metric_table(
        selection,
        figures,
        [n for n in numbers if not n.key.endswith("_dense")],
        f"{name}_selected",
        f"{label}: sparsity and reconstruction on {dataset_title(dataset)}",
        f"The code as the SAE selects it. {{}}{also}",
        paper,
    )
    dense = _metric_table(
        selection,
        figures,
        [n for n in numbers if n.key.endswith("_dense")],
        f"{name}_dense",
        f"{label}: the same without the selection, on {dataset_title(dataset)}",
        "The code without its selection: the positive scores before top-k, threshold or "
        f"sparsemax. {_WHICH_CODE if paper else ''}{{}}",
        paper,
    )
    return [table for table in (selected, dense) if paper or not table.empty]


def interpretability_tables(selection: Selection, dataset: str) -> list[Table]:
    """Table 6 of one dataset, one for each pooling and image encoder that was used."""
    paper = dataset == MEASURED_ON
    numbers = [n for n in NUMBERS if n.table == "interpretability"]
    figures = selection.metrics[
        (selection.metrics.dataset == dataset)
        & selection.metrics.metric.isin([n.key for n in numbers])
    ]
    ways = sorted(set(zip(figures.image_encoder, figures.pooling, strict=True)))
    tables = []
    for at, (encoder, pooling) in enumerate(ways or [("", "")] * paper, start=1):
        several = len(ways) > 1
        caption = (
            "Mean and maximum over live latents of the similarity of the images that a latent is "
            "active on, weighted by its activations."
        )
        if encoder:
            caption += f" Image encoder: {encoder}; pooling of token codes: {pooling}."
        if paper:
            caption += " The paper does not say which encoder, pooling and data it used."
        tables.append(
            _metric_table(
                selection,
                figures[(figures.image_encoder == encoder) & (figures.pooling == pooling)],
                numbers,
                ("table_06" if paper else f"monosemanticity_{slug(dataset)}")
                + (f"_{at}" if several else ""),
                f"{'Table 6' if paper else 'As Table 6'}: MonoSemanticity on "
                f"{dataset_title(dataset)}" + (f" ({encoder}, {pooling})" if several else ""),
                caption,
                paper,
            )
        )
    return tables


def recovery_table(selection: Selection, dataset: str) -> Table:
    """How well single latents are the concepts of a dataset with ground truth."""
    return _metric_table(
        selection,
        _without_encoder(selection, dataset),
        [n for n in NUMBERS if n.table == "recovery"],
        f"recovery_{slug(dataset)}",
        f"Concepts found on {dataset_title(dataset)}",
        "Against the ground truth, per patch and per image. {} Ours only.",
    )


def _without_encoder(selection: Selection, dataset: str) -> pd.DataFrame:
    """Metrics of one dataset that have nothing to do with an image encoder."""
    metrics = selection.metrics
    return metrics[(metrics.dataset == dataset) & (metrics.image_encoder == "")]


def stability_table(selection: Selection, found: list[Stability]) -> Table:
    """Mean max cosine between the decoders of different seeds."""
    return Table(
        name="stability",
        title="Seed stability",
        caption=(
            "For each decoder row of one seed the largest cosine with a row of another seed, mean "
            "over rows and over ordered pairs of seeds (spread: over pairs). Ours only."
        ),
        heads=("model", "trained on"),
        columns=(Column("cosine", "mean max cosine", 3), Column("pairs", "pairs of seeds", 0, "")),
        rows=tuple(
            Row(
                (row_title(selection, s.line), s.trained_on),
                {"cosine": Cell(s.mean, s.std, s.pairs), "pairs": Cell(float(s.pairs))},
                s.line.model,
            )
            for s in found
        ),
    )

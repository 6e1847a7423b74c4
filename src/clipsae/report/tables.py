"""The tables: accuracies (Tables 7-17), their average and ranks, fidelity, the ablation, metrics
(Tables 5 and 6, concepts found) and seed stability."""

import itertools
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd
from safetensors import SafetensorError

from clipsae.evaluation.metrics import NUMBERS
from clipsae.evaluation.metrics.fidelity import fidelity
from clipsae.evaluation.metrics.stability import matched_cosine, mean_max_cosine
from clipsae.evaluation.numbers import Number
from clipsae.report import published
from clipsae.report.collect import Collected
from clipsae.report.names import SIX, column_order, column_title, dataset_title, slug
from clipsae.report.select import Selection
from clipsae.report.settings import Line
from clipsae.report.table import Cell, Row, Table
from clipsae.sae import SAE

PAPER_COLUMNS = ("no_sae", "on_1", "on_5", "on_10", "on_50", "on_all")
MEASURED_ON = "imagenet"  # our reading of Tables 5 and 6, which do not say it
LARGEST = 8192  # latents; from there comparing two seeds takes minutes without a GPU
_COUNTED = {
    "paper": "latents counted on the evaluated images themselves",
    "heldout": "latents counted on the training split",
}


# --- accuracies ---


def accuracy_columns(selection: Selection, datasets: Iterable[str]) -> list[str]:
    """no_sae and on_n: all that were evaluated, and the paper's where it has a dataset or
    nothing was."""
    datasets, cells = list(datasets), selection.cells
    cells = cells[cells.dataset.isin(datasets) & cells.model.isin(selection.models)]
    found = {c for c in cells.metric if c == "no_sae" or c.startswith("on_")}
    if not found or set(datasets) & set(published.table_numbers()):
        found |= set(PAPER_COLUMNS)
    return sorted(found, key=column_order)


def _columns(selection: Selection, keys: Iterable[str], better: str = "max") -> tuple[Number, ...]:
    """Columns of accuracies: higher is better, but for CLIP alone and without the latents."""
    titles = {key: column_title(key, selection.wanted.latents) for key in keys}
    ends = {"no": "", "off": "min"}
    return tuple(
        Number(key, title, format=".2f", better=ends.get(key.partition("_")[0], better))
        for key, title in titles.items()
    )


def _rows(
    selection: Selection,
    figures: pd.DataFrame,
    columns: Sequence[Number],
    known: Mapping[tuple[str, str], str],
    lines: Sequence[Line] | None = None,
) -> tuple[Row, ...]:
    """A row a line of figures of one dataset, beside the published ones by model and key.

    Args:
        lines: None: those with a figure, and of each model at least one.
    """
    keys = [column.key for column in columns]
    if lines is None:
        lines = selection.shown(figures[figures.metric.isin(keys)])
    rows = []
    for line in lines:
        ours = selection.rows(figures, line).set_index("metric")
        cells = {}
        for key in keys:
            printed = known.get((line.model, key.removesuffix("_dense")), "")
            cell = Cell(published=float(printed), printed=printed) if printed else Cell()
            if key in ours.index and not pd.isna(ours.value[key]):
                cell = replace(cell, ours=float(ours.value[key]))
                if key != "no_sae":  # CLIP alone: seeds change nothing
                    seeds, std = int(ours.seeds[key]), float(ours["std"][key])
                    cell = replace(cell, seeds=seeds, std=std if seeds > 1 else None)
            cells[key] = cell
        rows.append(Row((selection.title(line),), cells, line.model))
    return tuple(rows)


def accuracy_tables(selection: Selection, dataset: str) -> list[Table]:
    """One of Tables 7-17, or its counterpart for a dataset that the paper does not have; off_n and
    self_n, which the paper does not tabulate, where there are any."""
    title, at = dataset_title(dataset), published.table_numbers().get(dataset)
    protocol = selection.wanted.protocol
    cells = selection.cells[selection.cells.dataset == dataset]
    known = {(m, key): v for (d, m, key), v in published.zero_shot().items() if d == dataset}
    columns = _columns(selection, accuracy_columns(selection, [dataset]))
    accuracy = Table(
        f"table_{at:02d}_{slug(dataset)}" if at else f"accuracy_{slug(dataset)}",
        f"Table {at}: {title}" if at else f"{title}: accuracy",
        "Macro accuracy in percent. on_n keeps the n latents of the image's own class "
        f"({_COUNTED.get(protocol, protocol)}), on_{selection.wanted.latents} all of them; "
        f"no_sae is CLIP alone.{_images(cells)}",
        columns,
        _rows(selection, cells, columns, known),
    )
    found = {key for line in selection.lines for key in selection.of(line, dataset).metric}
    keys = sorted((k for k in found if k.startswith(("off_", "self_"))), key=column_order)
    columns = _columns(selection, keys)
    others = Table(
        f"settings_{slug(dataset)}",
        f"{title}: without the class's latents, and without labels",
        "Macro accuracy in percent, ours only. off_n keeps all but the n latents of the "
        "image's class (lower: those n carried more); self_n keeps the n latents that are "
        "most active in the image itself and uses no label.",
        columns,
        _rows(selection, cells, columns, {}),
    )
    return [accuracy, others] if keys else [accuracy]


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


def ablation_tables(selection: Selection) -> list[Table]:
    """The 2 x 2 ablation, architecture x activation: on ImageNet with the eleven datasets, and
    wherever there are results of its two mixed models. Published for ImageNet."""
    parts, columns = published.ablation_parts(), _columns(selection, PAPER_COLUMNS[1:5])
    found = set(selection.cells.dataset[selection.cells.model.isin(set(parts) - set(SIX))])
    if selection.wanted.models is None:
        found |= {published.ABLATED_ON} & set(selection.eleven)
    tables = []
    for dataset in (name for name in selection.datasets if name in found):
        known = published.ablation() if dataset == published.ABLATED_ON else {}
        cells = selection.cells[selection.cells.dataset == dataset]
        lines = [
            line
            for line in selection.ablated
            if len(selection.of(line, dataset)) or line == selection.main(line.model)
        ]
        rows = _rows(selection, cells, columns, known, lines)
        rows = tuple(replace(row, labels=(*row.labels, *parts[row.model])) for row in rows)
        caption = "Macro accuracy in percent."
        if known:
            caption += " Published: the ablation's own figures for the mixed models, "
            caption += "Table 12 for the others."
        tables.append(
            Table(
                f"ablation_{slug(dataset)}",
                f"Ablation of architecture and activation: {dataset_title(dataset)}",
                caption,
                columns,
                tuple(sorted(rows, key=lambda row: (row.labels[1] != "linear", row.labels[2]))),
                heads=("model", "architecture", "activation"),
            )
        )
    return tables


# --- over several datasets ---


def average_table(selection: Selection, datasets: tuple[str, ...], name: str, title: str) -> Table:
    """Mean over datasets; published figures over the same datasets as ours."""
    keys = accuracy_columns(selection, datasets)
    rows, over = [], set()
    for line in selection.shown(selection.cells[selection.cells.dataset.isin(datasets)]):
        evaluated = frozenset(selection.of(line).dataset) & frozenset(datasets)
        cells = {key: _average(selection, line, datasets, key) for key in keys}
        cells["datasets"] = Cell(float(len(evaluated)))
        rows.append(Row((selection.title(line),), cells, line.model))
        over |= {evaluated} if evaluated else set()
    caption = (
        "Mean macro accuracy in percent over the datasets that a row has results for; their "
        "number is in the last column."
    )
    columns = _columns(selection, keys)
    if len(over) > 1:
        caption += " Rows over different datasets are not comparable: no best is marked."
        columns = tuple(replace(column, better="") for column in columns)
    if set(datasets) & set(published.table_numbers()):
        caption += " Published means are over the same datasets, or over all where we have none."
    count = Number("datasets", f"of {len(datasets)}", format=".0f", better="")
    return Table(name, f"Average over {title}", caption, (*columns, count), tuple(rows))


def _average(selection: Selection, line: Line, datasets: tuple[str, ...], key: str) -> Cell:
    """Mean over the datasets with results, and of the published figures over the same; the spread
    is that of the seeds' averages."""
    cells = selection.of(line)
    cells = cells[(cells.metric == key) & cells.dataset.isin(datasets)]
    known = published.zero_shot()
    printed = [known.get((d, line.model, key), "") for d in list(cells.dataset) or datasets]
    mean = statistics.fmean(map(float, printed)) if all(printed) else None
    cell = Cell(published=mean, printed="" if mean is None else f"{mean:.3f}")
    if cells.empty:
        return cell
    cell = replace(cell, ours=float(cells.value.mean()))
    runs = selection.rows(selection.runs, line)
    runs = runs[(runs.metric == key) & runs.dataset.isin(datasets)]
    by_seed = runs.pivot(index="seed", columns="dataset", values="value").dropna().mean(axis=1)
    if len(by_seed) > 1 and key != "no_sae":
        cell = replace(cell, std=float(by_seed.std()), seeds=len(by_seed))
    return cell


@dataclass(frozen=True)
class Compared:
    """Lines that can be compared, over the datasets that all of them have."""

    group: str  # what they have in common and others have not; "": nothing sets them apart
    lines: tuple[Line, ...]  # at least two
    datasets: tuple[str, ...]
    left_out: dict[Line, int]  # lines with results on fewer of these datasets, and on how many

    def values(self, selection: Selection, figures: pd.DataFrame, key: str) -> pd.DataFrame:
        """Values of `cells` or `metrics` [dataset, line], datasets with a gap left out."""
        figures = figures[(figures.metric == key) & figures.dataset.isin(self.datasets)]
        columns = {x: selection.rows(figures, x).set_index("dataset").value for x in self.lines}
        return pd.DataFrame(columns, columns=list(self.lines)).dropna()

    def published(self, datasets: Iterable[str], key: str) -> pd.DataFrame:
        """The paper's counterpart; empty if a figure is missing or a model has several lines."""
        known, models = published.zero_shot(), [line.model for line in self.lines]
        rows = [[float(known.get((d, model, key), "nan")) for model in models] for d in datasets]
        frame = pd.DataFrame(rows, columns=list(self.lines))
        several = len(set(models)) < len(models)
        return pd.DataFrame() if several or frame.isna().any(axis=None) else frame


def compared(selection: Selection, datasets: tuple[str, ...]) -> list[Compared]:
    """What can be compared within each group of results with the same settings.

    The lines with results on most datasets are taken, as many of them as make the largest table of
    lines by datasets without a gap: a model with one dataset does not cost the others theirs.
    """
    groups: dict[str, dict[Line, set[str]]] = {}
    for line in selection.lines:
        if evaluated := set(selection.of(line).dataset):
            groups.setdefault(line.common, {})[line] = evaluated & set(datasets)
    found = []
    for label, has in groups.items():
        ordered = sorted((line for line in has if has[line]), key=lambda line: -len(has[line]))
        shared = {
            n: set.intersection(*(has[line] for line in ordered[:n]))
            for n in range(2, len(ordered) + 1)
        }
        best = max(shared, key=lambda n: (n * len(shared[n]), n), default=0)
        over = tuple(name for name in datasets if best and name in shared[best])
        if over:
            chosen = tuple(line for line in has if set(over) <= has[line])
            left_out = {x: len(has[x] & set(over)) for x in ordered if x not in chosen}
            found.append(Compared(label, chosen, over, left_out))
    return found


def rank_table(selection: Selection, group: Compared, name: str) -> Table:
    """Mean rank of the models for each n, ours and published, over the same datasets."""
    keys = [c for c in accuracy_columns(selection, group.datasets) if c != "no_sae"]
    rows: dict[Line, dict[str, Cell]] = {line: {} for line in group.lines}
    counts = []
    for key in keys:
        ours = group.values(selection, selection.cells, key)
        theirs = group.published(ours.index, key)
        counts.append(len(ours))
        mean, of_paper = (f.rank(axis=1, ascending=False).mean().dropna() for f in (ours, theirs))
        for line in group.lines:
            cell = Cell(float(mean[line])) if line in mean else Cell()
            if line in of_paper:
                rank = float(of_paper[line])
                cell = replace(cell, published=rank, printed=f"{rank:.2f}")
            rows[line][key] = cell
    names, fewest = ", ".join(map(dataset_title, group.datasets)), min(counts, default=0)
    fewer = f" Some columns have figures for {fewest} of them." * (fewest < len(group.datasets))
    if group.left_out:
        absent = (f"{selection.title(line)} ({n})" for line, n in group.left_out.items())
        fewer += f" Excluded, with results for fewer of these datasets: {', '.join(absent)}."
    return Table(
        name,
        ": ".join(filter(None, (f"Mean rank over {len(group.datasets)} datasets", group.group))),
        f"1 is the best of {len(group.lines)}; ties share their mean rank. Over the datasets "
        f"that all of them have results for: {names}.{fewer} Published ranks, where there are "
        "any, are among the same models and datasets.",
        _columns(selection, keys, "min"),
        tuple(Row((selection.title(line),), rows[line], line.model) for line in group.lines),
    )


def fidelity_table(selection: Selection) -> Table:
    """(on_M - chance) / (no_sae - chance) of every dataset and model."""
    lines = {selection.title(line): line for line in selection.shown(selection.cells)}
    rows = []
    for dataset in selection.datasets:
        cells = {}
        for title, line in lines.items():
            figures = selection.of(line, dataset).set_index("metric")
            if {"no_sae", "on_all"} <= set(figures.index):
                chance = 100 / float(figures.competing["on_all"])
                value = fidelity(figures.value["on_all"], figures.value["no_sae"], chance)
                cells[title] = Cell(None if pd.isna(value) else float(value))
        rows.append(Row((dataset_title(dataset),), cells))
    return Table(
        "fidelity",
        "Fidelity of the reconstruction",
        f"(on_{selection.wanted.latents} - chance) / (no_sae - chance): the share of CLIP's "
        "accuracy above chance that is left when every token is replaced by its "
        "reconstruction. Ours only.",
        tuple(Number(title, title, better="") for title in lines),
        tuple(rows),
        heads=("dataset",),
    )


# --- measured numbers ---


def metric_tables(selection: Selection, dataset: str) -> list[Table]:
    """Table 5 of one dataset, of the codes as selected and of the code without its selection;
    Table 6, one for each pooling and image encoder that was used; concepts found. Those that have
    a figure, of ImageNet the paper's in any case."""
    paper = dataset == MEASURED_ON
    on, title = slug(dataset), dataset_title(dataset)
    metrics = selection.metrics[selection.metrics.dataset == dataset]
    label, name = ("Table 5", "table_05") if paper else ("As Table 5", f"sparsity_{on}")
    # Table of the record of numbers, dense code, image encoder, pooling; name, title, caption.
    selected = (
        ("sparsity", False, "", ""),
        f"{name}_selected",
        f"{label}: sparsity and reconstruction on {title}",
        "The code as the SAE selects it. {}"
        + " Published: on data that the paper does not name." * paper,
    )
    which_code = (
        "The published zero fractions of TopK and BatchTopK (0.966, 0.814) are far from k = 32 of "
        "49,152 (0.9993): presumably the paper counted this code for them. Both tables show the "
        "published values. "
    )
    dense = (
        ("sparsity", True, "", ""),
        f"{name}_dense",
        f"{label}: the same without the selection, on {title}",
        "The code without its selection: the positive scores before top-k, threshold or "
        f"sparsemax. {which_code * paper}{{}}",
    )
    recovered = (
        ("recovery", False, "", ""),
        f"recovery_{on}",
        f"Concepts found on {title}",
        "Against the ground truth, per patch and per image. {} Ours only.",
    )
    probed = (
        ("probing", False, "", ""),
        f"probing_{on}",
        f"Probes and maps on {title}",
        "What few latents, and all, tell of an image, and whether a latent's patches lie together "
        "and on a concept. {} Ours only.",
    )
    label, name = ("Table 6", "table_06") if paper else ("As Table 6", f"monosemanticity_{on}")
    scores = metrics[metrics.image_encoder != ""]
    ways = sorted(set(zip(scores.image_encoder, scores.pooling, strict=True)))
    several, by_encoder = len(ways) > 1, []
    for at, (encoder, pooling) in enumerate(ways or [("", "")], start=1):
        used = f" Image encoder: {encoder}; pooling of token codes: {pooling}." if encoder else ""
        by_encoder.append(
            (
                ("interpretability", False, encoder, pooling),
                name + f"_{at}" * several,
                f"{label}: MonoSemanticity on {title}" + f" ({encoder}, {pooling})" * several,
                "Mean and maximum over live latents of the similarity of the images that a latent "
                f"is active on, weighted by its activations.{used}"
                + " The paper does not say which encoder, pooling and data it used."
                * paper,
            )
        )
    found = []
    for (kind, is_dense, encoder, pooling), *about in (
        selected,
        dense,
        *by_encoder,
        recovered,
        probed,
    ):
        figures = metrics[metrics.image_encoder.eq(encoder) & metrics.pooling.eq(pooling)]
        table = _metric_table(selection, figures, kind, is_dense, paper, *about)
        if table.columns and (paper or not table.empty):
            found.append(table)
    return found


def _metric_table(
    selection: Selection,
    figures: pd.DataFrame,
    kind: str,
    dense: bool,
    paper: bool,
    name: str,
    title: str,
    caption: str,
) -> Table:
    """A table of the numbers that are there, and with `paper` those that the paper has; {} in the
    caption stands for what the numbers are."""
    measured = set(figures.metric)
    numbers = [n for n in NUMBERS if n.table == kind and n.key.endswith("_dense") == dense]
    columns = tuple(n for n in numbers if n.key in measured or (paper and n.paper))
    # Of several levels of one number the first says it.
    meanings = {n.label.partition(", ")[0]: n.meaning for n in columns if n.meaning}
    caption = caption.replace("{}", " ".join(f"{x}: {said}." for x, said in meanings.items()))
    rows = _rows(selection, figures, columns, published.metrics() if paper else {})
    return Table(name, title, caption, columns, rows)


# --- seeds ---


def stability_table(
    root: Path | str, found: Collected, selection: Selection
) -> tuple[Table, list[str]]:
    """Mean max cosine between the decoders of different seeds, of each model with the tables' k.

    Returns:
        the table, and a line for each SAE that could not be read. Nothing is compared above
        `LARGEST` latents.
    """
    groups: dict[tuple[Line, str], dict[int, str]] = {}
    if selection.wanted.latents <= LARGEST:
        for run in selection.runs.drop_duplicates("folder").itertuples():
            meta, config = found.origins[run.folder].values()
            name = (meta.get("key") or {}).get("sae")
            trained_on = (config.get("train_dataset") or {}).get("name") or run.dataset
            if name and selection.k.get(run.line) == run.k:
                groups.setdefault((run.line, trained_on), {})[run.seed] = name
    rows, problems = [], []
    order = {line: at for at, line in enumerate(selection.lines)}
    for line, trained_on in sorted(groups, key=lambda group: order.get(group[0], len(order))):
        by_seed = groups[line, trained_on]
        decoders = []
        for name in by_seed.values() if len(by_seed) > 1 else ():
            folder = Path(root) / "sae" / name
            try:
                decoders.append(SAE.load(folder).decoder_rows().detach())
            except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
                why = " ".join(str(error).split())
                problems.append(f"sae/{name}: {why.replace(f'{folder}/', '')}")
        values = [float(mean_max_cosine(a, b)) for a, b in itertools.permutations(decoders, 2)]
        if values:
            std = statistics.stdev(values) if len(values) > 2 else None
            cosine = Cell(statistics.fmean(values), std, len(values))
            cells = {"cosine": cosine, "pairs": Cell(float(len(values)))}
            # Symmetric: a pair of seeds counts once.
            pairs = [float(matched_cosine(a, b)) for a, b in itertools.combinations(decoders, 2)]
            spread = statistics.stdev(pairs) if len(pairs) > 1 else None
            cells["matched"] = Cell(statistics.fmean(pairs), spread, len(pairs))
            rows.append(Row((selection.title(line), trained_on), cells, line.model))
    caption = (
        "For each decoder row of one seed the largest cosine with a row of another seed, mean "
        "over rows and over ordered pairs of seeds (spread: over pairs). Matched: the mean cosine "
        "of rows that are matched one to one, so that their sum is the largest. Ours only."
    )
    columns = (
        Number("cosine", "mean max cosine"),
        Number("matched", "matched cosine"),
        Number("pairs", "pairs of seeds", format=".0f", better=""),
    )
    heads = ("model", "trained on")
    return Table("stability", "Seed stability", caption, columns, tuple(rows), heads), problems

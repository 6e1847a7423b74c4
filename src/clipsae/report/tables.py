"""The tables: accuracies (Tables 7-17), their average and ranks, fidelity, the ablation, metrics
(Tables 5 and 6, concepts found) and seed stability."""

import itertools
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
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
from clipsae.report.names import SIX, column_order, column_title, dataset_title, listed, slug
from clipsae.report.noise import LEVEL, reliability
from clipsae.report.select import Selection
from clipsae.report.settings import FITTED, NOT_LEARNED, TRAINED, Line
from clipsae.report.table import Cell, Row, Table
from clipsae.sae import SAE

PAPER_COLUMNS = ("no_sae", "on_1", "on_5", "on_10", "on_50", "on_all")
MEASURED_ON = "imagenet"  # our reading of Tables 5 and 6, which do not say it
LARGEST = 8192  # latents; from there comparing two seeds takes minutes without a GPU
BELOW = "Not learned, or only in part"
ABOVE = "Ceiling"
GLANCE = (
    *("l0", "fvu", "dead_fraction", "patch_concepts_found", "monosemanticity_mean"),
    *("sparse_probing_auc", "cknna"),
)
_COUNTED = {
    "paper": "latents counted on the evaluated images themselves",
    "heldout": "latents counted on the training split",
}
_RANKED = {
    "frequency": "those active most often on its images",
    "contrast": "those active more often on its images than on the mean class's",
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
) -> dict[Line, Row]:
    """A row a line of figures of one dataset, beside the published ones by model and key; below
    them the baselines that have a figure.

    Args:
        lines: None: those with a figure, and of each model at least one.
    """
    keys = [column.key for column in columns]
    filled = figures[figures.metric.isin(keys)]
    lines = selection.shown(filled) if lines is None else lines
    rows = {}
    for line in (*lines, *selection.below(filled)):
        ours = selection.rows(figures, line).set_index("metric")
        cells = {}
        for column in columns:
            key = column.key
            printed = known.get((line.model, key.removesuffix("_dense")), "")
            if line.learned != TRAINED:
                printed = ""
            cell = Cell(published=float(printed), printed=printed) if printed else Cell()
            if key in ours.index and not pd.isna(ours.value[key]):
                ends = (ours.value.get(end) for end in (column.floor, column.ceiling))
                floor, ceiling = (None if x is None or pd.isna(x) else float(x) for x in ends)
                if line.learned in NOT_LEARNED:
                    floor = ceiling = None
                elif floor is not None and ceiling is not None:
                    up = -1 if column.better == "min" else 1
                    if up * (ceiling - floor) <= 0:  # a gap that nothing could close
                        ceiling = None
                cell = replace(cell, ours=float(ours.value[key]), floor=floor, ceiling=ceiling)
                if key != "no_sae":  # CLIP alone: seeds change nothing
                    seeds, std = int(ours.seeds[key]), float(ours["std"][key])
                    cell = replace(cell, seeds=seeds, std=std if seeds > 1 else None)
            cells[key] = cell
        rows[line] = _row(selection, line, cells)
    return rows


def _row(selection: Selection, line: Line, cells: dict[str, Cell]) -> Row:
    block = "" if line.learned == TRAINED else BELOW
    return Row((selection.title(line),), cells, line.model, block)


def _close_gaps(
    selection: Selection,
    rows: Mapping[Line, Row],
    columns: Sequence[Number],
    ceiling: Callable[[Line, Row], float | None],
    called: str,
) -> str:
    """Give the cells of `rows` whose SAE has learned a floor and a ceiling: what the untrained SAE
    of the same variant reaches, or where there is none the best that has not learned.

    Args:
        columns: those where higher is better and that have the ceiling.
        ceiling: of a line's cells; None: not known.
        called: the ceiling's name.

    Returns:
        What the caption says of it; "": no cell has a gap.
    """
    idle = [line for line in rows if line.learned in NOT_LEARNED]
    of_variant, best_of = False, {}
    for line, row in rows.items():
        top = None if line in idle else ceiling(line, row)
        twin = selection.untrained(line)
        for column in columns if top is not None else ():
            cell, title = row.cell(column), column.label
            known = {x: rows[x].cell(column).ours for x in idle}
            known = {x: value for x, value in known.items() if value is not None}
            if cell.ours is None or not known:
                continue
            below = twin if twin in known else max(known, key=known.__getitem__)
            bounded = replace(cell, floor=known[below], ceiling=top)
            if bounded.gap is None or known[below] > top:
                continue
            row.cells[column.key] = bounded
            if below == twin:
                of_variant = True
            else:
                best_of.setdefault(selection.title(below), {})[title] = None
    if not of_variant and not best_of:
        return ""
    floor = "the untrained SAE of the same variant" * of_variant
    if best_of:
        where = ", ".join(f"{title} at {listed(list(at))}" for title, at in best_of.items())
        floor += ", where there is none " * of_variant + f"the best that has not learned ({where})"
    return f" Gap closed: (value - floor) / ({called} - floor); the floor is {floor}."


def _alone(figures: pd.DataFrame, selection: Selection) -> Callable[[Line, Row], float | None]:
    """`no_sae` of a line on one dataset, the ceiling of accuracies."""

    def ceiling(line: Line, row: Row) -> float | None:
        found = selection.rows(figures, line).set_index("metric").value.get("no_sae")
        return None if found is None or pd.isna(found) else float(found)

    return ceiling


def _below_no_sae(columns: Sequence[Number]) -> list[Number]:
    return [column for column in columns if column.key.startswith(("on_", "self_"))]


def accuracy_tables(selection: Selection, dataset: str) -> list[Table]:
    """One of Tables 7-17, or its counterpart for a dataset that the paper does not have; off_n and
    self_n, which the paper does not tabulate, where there are any."""
    title, at = dataset_title(dataset), published.table_numbers().get(dataset)
    protocol = selection.wanted.protocol
    ranked = _RANKED.get(selection.wanted.ranking, selection.wanted.ranking)
    cells = selection.cells[selection.cells.dataset == dataset]
    known = {(m, key): v for (d, m, key), v in published.zero_shot().items() if d == dataset}
    columns = _columns(selection, accuracy_columns(selection, [dataset]))
    rows = _rows(selection, cells, columns, known)
    alone = _alone(cells, selection)
    gaps = _close_gaps(selection, rows, _below_no_sae(columns), alone, "no_sae")
    accuracy = Table(
        f"table_{at:02d}_{slug(dataset)}" if at else f"accuracy_{slug(dataset)}",
        f"Table {at}: {title}" if at else f"{title}: accuracy",
        f"Macro accuracy in percent. on_n keeps n latents of the image's own class: {ranked} "
        f"({_COUNTED.get(protocol, protocol)}); on_{selection.wanted.latents} keeps all of them; "
        f"no_sae is CLIP alone.{_images(cells)}{gaps}",
        columns,
        tuple(rows.values()),
    )
    found = {key for line in selection.lines for key in selection.of(line, dataset).metric}
    keys = sorted((k for k in found if k.startswith(("off_", "self_"))), key=column_order)
    columns = _columns(selection, keys)
    rows = _rows(selection, cells, columns, {})
    gaps = _close_gaps(selection, rows, _below_no_sae(columns), alone, "no_sae")
    others = Table(
        f"settings_{slug(dataset)}",
        f"{title}: without the class's latents, and without labels",
        "Macro accuracy in percent, ours only. off_n keeps all but the n latents of the "
        "image's class (lower: those n carried more); self_n keeps the n latents that are "
        f"most active in the image itself and uses no label.{gaps}",
        columns,
        tuple(rows.values()),
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

    def order(row: Row) -> tuple[str, bool, str]:
        return row.block, row.labels[1] != "linear", row.labels[2]

    for dataset in (name for name in selection.datasets if name in found):
        known = published.ablation() if dataset == published.ABLATED_ON else {}
        cells = selection.cells[selection.cells.dataset == dataset]
        lines = [
            line
            for line in selection.ablated
            if len(selection.of(line, dataset)) or line == selection.main(line.model)
        ]
        rows = _rows(selection, cells, columns, known, lines)
        alone = _alone(cells, selection)
        gaps = _close_gaps(selection, rows, columns, alone, "no_sae")
        labelled = [
            replace(row, labels=(*row.labels, *parts.get(row.model, ("", ""))))
            for line, row in rows.items()
            if line.learned == FITTED or line.model in parts
        ]
        caption = f"Macro accuracy in percent.{gaps}"
        if known:
            caption += " Published: the ablation's own figures for the mixed models, "
            caption += "Table 12 for the others."
        tables.append(
            Table(
                f"ablation_{slug(dataset)}",
                f"Ablation of architecture and activation: {dataset_title(dataset)}",
                caption,
                columns,
                tuple(sorted(labelled, key=order)),
                heads=("model", "architecture", "activation"),
            )
        )
    return tables


# --- over several datasets ---


def average_table(selection: Selection, datasets: tuple[str, ...], name: str, title: str) -> Table:
    """Mean over datasets; published figures over the same datasets as ours."""
    keys = accuracy_columns(selection, datasets)
    rows, over = {}, set()
    here = selection.cells[selection.cells.dataset.isin(datasets)]
    for line in (*selection.shown(here), *selection.below(here)):
        evaluated = frozenset(selection.of(line).dataset) & frozenset(datasets)
        cells = {key: _average(selection, line, datasets, key) for key in keys}
        cells["datasets"] = Cell(float(len(evaluated)))
        rows[line] = _row(selection, line, cells)
        over |= {evaluated} if evaluated else set()
    caption = (
        "Mean macro accuracy in percent over the datasets that a row has results for; their "
        "number is in the last column."
    )
    columns = _columns(selection, keys)
    if len(over) > 1:
        caption += " Rows over different datasets are not comparable: no best is marked."
        columns = tuple(replace(column, better="") for column in columns)
    else:

        def alone(line: Line, row: Row) -> float | None:
            return row.cells["no_sae"].ours if "no_sae" in row.cells else None

        caption += _close_gaps(selection, rows, _below_no_sae(columns), alone, "no_sae")
    if set(datasets) & set(published.table_numbers()):
        caption += " Published means are over the same datasets, or over all where we have none."
    count = Number("datasets", f"of {len(datasets)}", format=".0f", better="")
    return Table(name, f"Average over {title}", caption, (*columns, count), tuple(rows.values()))


def _average(selection: Selection, line: Line, datasets: tuple[str, ...], key: str) -> Cell:
    """Mean over the datasets with results, and of the published figures over the same."""
    cells = selection.of(line)
    cells = cells[(cells.metric == key) & cells.dataset.isin(datasets)]
    known = published.zero_shot()
    printed = [known.get((d, line.model, key), "") for d in list(cells.dataset) or datasets]
    published_too = line.learned == TRAINED and all(printed)
    mean = statistics.fmean(map(float, printed)) if published_too else None
    ours = average_cell(selection, selection.runs, line, datasets, key)
    return replace(ours, published=mean, printed="" if mean is None else f"{mean:.3f}")


def average_cell(
    selection: Selection, runs: pd.DataFrame, line: Line, datasets: tuple[str, ...], key: str
) -> Cell:
    """Mean over those of the datasets that a line has; the spread is that of the seeds' averages.

    Args:
        runs: figures of single seeds, `selection.runs` or `selection.measured`.
    """
    runs = selection.rows(runs, line)
    runs = runs[(runs.metric == key) & runs.dataset.isin(datasets)].dropna(subset="value")
    if runs.empty:
        return Cell()
    cell = Cell(float(runs.groupby("dataset").value.mean().mean()))
    by_seed = _by_seed(runs).mean(axis=1)
    if len(by_seed) > 1 and key != "no_sae":
        cell = replace(cell, std=float(by_seed.std()), seeds=len(by_seed))
    return cell


def _by_seed(runs: pd.DataFrame) -> pd.DataFrame:
    """Values [seed, dataset] of one line and metric, of the seeds that have all the datasets."""
    return runs.pivot(index="seed", columns="dataset", values="value").dropna()


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
        shared = largest_common(has, 2)
        over = tuple(name for name in datasets if name in shared)
        if over:
            chosen = tuple(line for line in has if set(over) <= has[line])
            ordered = sorted((line for line in has if has[line]), key=lambda line: -len(has[line]))
            left_out = {x: len(has[x] & set(over)) for x in ordered if x not in chosen}
            found.append(Compared(label, chosen, over, left_out))
    return found


def largest_common(has: Mapping[Line, set[str]], least: int) -> set[str]:
    """The datasets of the largest table of lines by datasets without a gap, with at least so many
    lines; those with most datasets are taken first."""
    ordered = sorted((line for line in has if has[line]), key=lambda line: -len(has[line]))
    shared = {
        n: set.intersection(*(has[line] for line in ordered[:n]))
        for n in range(least, len(ordered) + 1)
    }
    best = max(shared, key=lambda n: (n * len(shared[n]), n), default=0)
    return shared[best] if best else set()


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
        of_seeds = _ranks_by_seed(selection, group, key, list(ours.index))
        for line in group.lines:
            cell = Cell(float(mean[line])) if line in mean else Cell()
            if len(of_seeds) > 1:
                cell = replace(cell, std=float(of_seeds[line].std()), seeds=len(of_seeds))
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


def _ranks_by_seed(
    selection: Selection, group: Compared, key: str, datasets: list[str]
) -> pd.DataFrame:
    """Mean ranks [seed, line], of the seeds that all lines have on all the datasets."""
    runs = selection.runs[(selection.runs.metric == key) & selection.runs.dataset.isin(datasets)]
    values = {line: _by_seed(selection.rows(runs, line)) for line in group.lines}
    seeds = set.intersection(*(set(found.index) for found in values.values()))
    ranks = {}
    for seed in sorted(seeds):
        of_seed = pd.DataFrame({line: found.loc[seed] for line, found in values.items()})
        ranks[seed] = of_seed.rank(axis=1, ascending=False).mean()
    return pd.DataFrame(ranks).T


def fidelity_table(selection: Selection) -> Table:
    """(on_M - chance) / (no_sae - chance) of every model on every dataset."""
    rows, runs = {}, selection.runs
    for line in (*selection.shown(selection.cells), *selection.below(selection.cells)):
        cells = {}
        for dataset in selection.classified:
            figures = selection.of(line, dataset).set_index("metric")
            if not {"no_sae", "on_all"} <= set(figures.index):
                continue
            chance = 100 / float(figures.competing["on_all"])
            alone = figures.value["no_sae"]
            value = fidelity(figures.value["on_all"], alone, chance)
            if pd.isna(value):
                continue
            mine = runs[runs.dataset.eq(dataset) & runs.metric.eq("on_all")]
            each = [fidelity(x, alone, chance) for x in selection.rows(mine, line).value]
            std = statistics.stdev(map(float, each)) if len(each) > 1 else None
            cells[dataset] = Cell(float(value), std, len(each))
        rows[line] = _row(selection, line, cells)
    columns = tuple(Number(name, dataset_title(name)) for name in selection.classified)
    gaps = _close_gaps(selection, rows, columns, lambda line, row: 1.0, "1")
    return Table(
        "fidelity",
        "Fidelity of the reconstruction",
        f"(on_{selection.wanted.latents} - chance) / (no_sae - chance): the share of CLIP's "
        "accuracy above chance that is left when every token is replaced by its "
        f"reconstruction. Ours only.{gaps}",
        columns,
        tuple(rows.values()),
    )


# --- measured numbers ---


def headline_table(selection: Selection, dataset: str) -> Table:
    """A number of each kind that was measured on one dataset (`GLANCE`): what an SAE is chosen by.
    MonoSemanticity is by the first image encoder and pooling."""
    figures = selection.metrics[selection.metrics.dataset == dataset]
    figures = figures.drop_duplicates(["line", "k", "metric"])
    known = {n.key: n for n in NUMBERS}
    columns = tuple(known[key] for key in GLANCE if key in set(figures.metric))
    rows = _rows(selection, figures, columns, {})
    title = dataset_title(dataset)
    return Table(
        f"headlines_{slug(dataset)}",
        f"{title}: at a glance",
        "What an SAE is chosen by; the tables below explain it. Compare SAEs of about the same "
        "L0. A floor and a ceiling below a number are what an untrained SAE of the same shape and "
        "a supervised probe reach on the same rows. Ours only.",
        columns,
        tuple(rows.values()),
    )


def metric_tables(selection: Selection, dataset: str) -> list[Table]:
    """Table 5 of one dataset, of the codes as selected and of the code without its selection;
    Table 6, one for each pooling and image encoder that was used; probes and maps; both towers.
    Those that have a figure, of ImageNet the paper's in any case."""
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
    probed = (
        ("probing", False, "", ""),
        f"probing_{on}",
        f"Probes and maps on {title}",
        "What few latents, and all, tell of an image, and whether a latent's patches lie together "
        "and on a concept. {} Ours only.",
    )
    both = (
        ("towers", False, "", ""),
        f"towers_{on}",
        f"Images and captions on {title}",
        "SAEs of both towers. {} Floor and ceiling of retrieval: chance, and CLIP's embeddings; "
        "floor of the bridge score: captions shuffled among the images. Ours only.",
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
    for (kind, is_dense, encoder, pooling), *about in (selected, dense, *by_encoder, probed, both):
        figures = metrics[metrics.image_encoder.eq(encoder) & metrics.pooling.eq(pooling)]
        table = _metric_table(selection, figures, kind, is_dense, paper, *about)
        if table.columns and (paper or not table.empty):
            found.append(table)
    return found


def recovery_tables(selection: Selection, dataset: str) -> list[Table]:
    """Which known concepts were recovered: a table for each level (patches, objects, images), with
    random directions below and a supervised probe above."""
    numbers = [n for n in NUMBERS if n.table == "recovery"]
    figures = selection.metrics[selection.metrics.dataset == dataset]
    levels = dict.fromkeys(n.key.partition("_")[0] for n in numbers)
    measured, ends = set(figures.metric), _ends()
    tables = []
    for level in levels:
        columns = tuple(
            replace(n, label=n.label.partition(", ")[0])
            for n in numbers
            if n.key.startswith(f"{level}_") and n.key in measured and n.key not in ends
        )
        if not columns:
            continue
        rows = list(_rows(selection, figures, columns, {}).values())
        for title, block, key_of in (
            ("Random directions (same rows)", BELOW, lambda n: f"{n.key}_random"),
            ("Supervised probe", ABOVE, lambda n: n.ceiling),
        ):
            values = {n.key: figures.value[figures.metric == key_of(n)].dropna() for n in columns}
            cells = {key: Cell(float(found.mean())) for key, found in values.items() if len(found)}
            rows += [Row((title,), cells, block=block)] if cells else []
        meanings = (f"{n.label}: {n.meaning}." for n in columns if n.meaning)
        table = Table(
            f"recovery_{level}_{slug(dataset)}",
            f"Concepts recovered on {dataset_title(dataset)}: {level} level",
            f"Against the ground truth. {' '.join(meanings)} Ours only.",
            columns,
            tuple(rows),
        )
        if table.has_gaps:
            caption = (
                f"{table.caption} Floor: an untrained SAE of the same shape; ceiling: the "
                "supervised probe; both from the same rows. Gap closed: (value - floor) / "
                "(ceiling - floor)."
            )
            table = replace(table, caption=caption)
        if not table.empty:
            tables.append(table)
    return tables


def _ends() -> set[str]:
    """Keys of numbers that say what others can reach: floors and ceilings."""
    return {end for n in NUMBERS for end in (n.floor, n.ceiling, f"{n.key}_random")}


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
    ends = _ends()
    numbers = [n for n in numbers if n.key not in ends]
    columns = tuple(n for n in numbers if n.key in measured or (paper and n.paper))
    # Of several levels of one number the first says it.
    meanings = {n.label.partition(", ")[0]: n.meaning for n in columns if n.meaning}
    caption = caption.replace("{}", " ".join(f"{x}: {said}." for x, said in meanings.items()))
    rows = _rows(selection, figures, columns, published.metrics() if paper else {})
    return Table(name, title, caption, columns, tuple(rows.values()))


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
    order = {line: at for at, line in enumerate((*selection.lines, *selection.baselines))}
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
            block = "" if line.learned == TRAINED else BELOW
            rows.append(Row((selection.title(line), trained_on), cells, line.model, block))
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


def noise_table(selection: Selection, dataset: str) -> Table:
    """For each accuracy and measured number of one dataset: does it vary more between the variants
    than between their seeds? (`reliability`); most telling first."""
    numbers = {n.key: n.label for n in NUMBERS}
    rows = []
    for frame in (selection.runs, selection.measured):
        frame = frame[frame.dataset.eq(dataset) & ~frame.metric.isin({"no_sae", *_ends()})]
        frame = frame[frame.tabled & frame.line.isin(selection.lines)].dropna(subset="value")
        ways = ["metric", "image_encoder", "pooling"]
        for (metric, encoder, pooling), mine in frame.groupby(ways, sort=False):
            found = reliability([list(g.value) for _, g in mine.groupby("line", sort=False)])
            if found is None:
                continue
            title = numbers.get(metric, column_title(metric, selection.wanted.latents))
            title += ", without the selection" * metric.endswith("_dense")
            if encoder:
                title += f" ({encoder}, {pooling})"
            values = {
                **{"icc": found.icc, "low": found.low, "high": found.high},
                **{"ratio": found.ratio, "within": found.within, "between": found.between},
                **{"variants": found.variants, "seeds": found.seeds},
            }
            cells = {key: Cell(float(value)) for key, value in values.items()}
            rows.append(Row((title, "yes" if found.tells else "no"), cells))
    rows.sort(key=lambda row: (-row.cells["icc"].ours, row.cells["ratio"].ours, row.labels))
    return Table(
        f"noise_{slug(dataset)}",
        f"Noise of the seeds against the variants: {dataset_title(dataset)}",
        "ICC: the share of a number's variance that lies between variants, the rest lying between "
        f"their seeds, with its {100 * LEVEL:.0f} % interval (one-way random effects, Shrout and "
        "Fleiss). A number tells variants apart if the F test of equal means rejects at 5 %; of "
        "many numbers some do by chance. Ratio: standard deviation over seeds (pooled over "
        "variants) by that of the variants' means: above 1 there is more noise than difference.",
        (
            Number("icc", "ICC", format=".2f", better=""),
            Number("low", "from", format=".2f", better=""),
            Number("high", "to", format=".2f", better=""),
            Number("ratio", "noise / difference", format=".2f", better=""),
            Number("within", "sd over seeds", format=".4f", better=""),
            Number("between", "sd of variants", format=".4f", better=""),
            Number("variants", "variants", format=".0f", better=""),
            Number("seeds", "SAEs", format=".0f", better=""),
        ),
        tuple(rows),
        heads=("number", "tells variants apart"),
    )

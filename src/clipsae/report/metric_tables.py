"""Tables 5 and 6, and what the paper does not measure: concepts found, seed stability."""

from collections.abc import Iterable

import pandas as pd

from clipsae.evaluation.metrics import NUMBERS
from clipsae.evaluation.numbers import Number
from clipsae.report import published
from clipsae.report.accuracy_tables import row_title
from clipsae.report.names import dataset_title, slug
from clipsae.report.select import Selection
from clipsae.report.stability import Stability
from clipsae.report.table import Cell, Column, Row, Table

MEASURED_ON = "imagenet"  # our reading of Tables 5 and 6, which do not say it

_WHICH_CODE = (
    "The published zero fractions of TopK and BatchTopK (0.966, 0.814) are far from k = 32 of "
    "49,152 (0.9993): presumably the paper counted this code for them. Both tables show the "
    "published values. "
)


def sparsity_tables(selection: Selection, dataset: str) -> list[Table]:
    """Table 5 of one dataset: of the codes as selected, and of the code without its selection."""
    paper = dataset == MEASURED_ON
    label = "Table 5" if paper else "As Table 5"
    name = "table_05" if paper else f"sparsity_{slug(dataset)}"
    also = " Published: on data that the paper does not name." if paper else ""
    of = _by_metric(selection, dataset)
    columns = [n for n in _of_table("sparsity") if not n.key.endswith("_dense")]
    without = [n for n in _of_table("sparsity") if n.key.endswith("_dense")]
    selected = Table(
        name=f"{name}_selected",
        title=f"{label}: sparsity and reconstruction on {dataset_title(dataset)}",
        caption=f"The code as the SAE selects it. {_meanings(columns)}{also}",
        heads=("model",),
        columns=_present(of, columns, paper),
        rows=_rows(selection, of, columns, paper),
    )
    dense = Table(
        name=f"{name}_dense",
        title=f"{label}: the same without the selection, on {dataset_title(dataset)}",
        caption=(
            "The code without its selection: the positive scores before top-k, threshold or "
            f"sparsemax. {_WHICH_CODE if paper else ''}{_meanings(without)}"
        ),
        heads=("model",),
        columns=_present(of, without, paper),
        rows=_rows(selection, of, without, paper),
    )
    return [table for table in (selected, dense) if paper or not table.empty]


def interpretability_tables(selection: Selection, dataset: str) -> list[Table]:
    """Table 6 of one dataset, one for each pooling and image encoder that was used."""
    paper = dataset == MEASURED_ON
    of = selection.metrics[
        (selection.metrics.dataset == dataset)
        & selection.metrics.metric.str.startswith("monosemanticity_")
    ]
    ways = sorted(set(zip(of.image_encoder, of.pooling, strict=True)))
    tables = []
    for number, (encoder, pooling) in enumerate(ways or [("", "")] * paper, start=1):
        here = of[(of.image_encoder == encoder) & (of.pooling == pooling)]
        columns = [n for n in _of_table("interpretability") if n.paper or n.key in set(here.metric)]
        how = f"Image encoder: {encoder}; pooling of token codes: {pooling}." if encoder else ""
        also = " The paper does not say which encoder, pooling and data its figures rest on."
        suffix = f"_{number}" if len(ways) > 1 else ""
        tables.append(
            Table(
                name=(f"table_06{suffix}" if paper else f"monosemanticity_{slug(dataset)}{suffix}"),
                title=f"{'Table 6' if paper else 'As Table 6'}: MonoSemanticity on "
                f"{dataset_title(dataset)}" + (f" ({encoder}, {pooling})" if suffix else ""),
                caption=(
                    "Mean and maximum over live latents of the similarity of the images that a "
                    f"latent is active on, weighted by its activations. {how}"
                    f"{also if paper else ''}"
                ).strip(),
                heads=("model",),
                columns=_present(here, columns, True),
                rows=_rows(selection, here, columns, paper),
            )
        )
    return tables


def recovery_table(selection: Selection, dataset: str) -> Table | None:
    """How well single latents are the concepts of a dataset with ground truth; None: unmeasured."""
    of = _by_metric(selection, dataset)
    columns = [n for n in _of_table("recovery") if n.key in set(of.metric)]
    if not columns:
        return None
    return Table(
        name=f"recovery_{slug(dataset)}",
        title=f"Concepts found on {dataset_title(dataset)}",
        caption=(
            f"Against the ground truth, per patch and per image. {_meanings(columns)} Ours only."
        ),
        heads=("model",),
        columns=_present(of, columns, False),
        rows=_rows(selection, of, columns, False),
    )


def stability_table(selection: Selection, found: list[Stability]) -> Table:
    """Mean max cosine between the decoders of different seeds."""
    columns = (Column("cosine", "mean max cosine", 3), Column("pairs", "pairs of seeds", 0, ""))
    return Table(
        name="stability",
        title="Seed stability",
        caption=(
            "For each decoder row of one seed the largest cosine with a row of another seed, mean "
            "over rows and over ordered pairs of seeds (spread: over pairs). Ours only."
        ),
        heads=("model", "trained on"),
        columns=columns,
        rows=tuple(
            Row(
                (row_title(selection, s.line), s.trained_on),
                {"cosine": Cell(s.mean, s.std, s.pairs), "pairs": Cell(float(s.pairs))},
                s.line.model,
            )
            for s in found
        ),
    )


def _by_metric(selection: Selection, dataset: str) -> pd.DataFrame:
    """Metrics of one dataset that have nothing to do with an image encoder."""
    return selection.metrics[
        (selection.metrics.dataset == dataset) & (selection.metrics.image_encoder == "")
    ]


def _of_table(name: str) -> list[Number]:
    return [number for number in NUMBERS if number.table == name]


def _meanings(numbers: list[Number]) -> str:
    """What the columns are; of several levels of one number once."""
    named = {n.label.partition(", ")[0]: n.meaning for n in numbers if n.meaning}
    return " ".join(f"{label}: {meaning}." for label, meaning in named.items())


def _present(of: pd.DataFrame, numbers: list[Number], paper: bool) -> tuple[Column, ...]:
    """All of the paper's table; of another those that were measured."""
    measured = set(of.metric)
    return tuple(
        Column(n.key, n.label, n.digits, n.better) for n in numbers if paper or n.key in measured
    )


def _rows(
    selection: Selection, of: pd.DataFrame, columns: Iterable[Number], paper: bool
) -> tuple[Row, ...]:
    known = published.metrics() if paper else {}
    rows = []
    for line in selection.shown(of[of.metric.isin([column.key for column in columns])]):
        mine = selection.rows(of, line).set_index("metric")
        cells = {}
        for column in columns:
            printed = known.get((line.model, column.key.removesuffix("_dense")))
            theirs = {} if printed is None else {"published": float(printed), "printed": printed}
            value = mine.value.get(column.key)
            if value is None or value != value:
                cells[column.key] = Cell(**theirs)
                continue
            at = mine.loc[column.key]
            std = float(at["std"]) if at.seeds > 1 else None
            cells[column.key] = Cell(float(value), std, int(at.seeds), **theirs)
        rows.append(Row((row_title(selection, line),), cells, line.model))
    return tuple(rows)

"""The 2 x 2 ablation: architecture (linear, attention) and activation (ReLU, sparsemax)."""

from clipsae.report import published
from clipsae.report.accuracy_tables import PAPER_COLUMNS, joined, plain_columns, row_title
from clipsae.report.names import SIX, dataset_title, slug
from clipsae.report.select import Selection
from clipsae.report.table import Row, Table


def ablation_table(selection: Selection, dataset: str) -> Table:
    """Architecture x activation on one dataset; published for ImageNet."""
    known = published.ablation() if dataset == published.ABLATED_ON else {}
    columns = PAPER_COLUMNS[1:5]
    rows = []
    parts = published.ablation_parts()
    for line in selection.ablated:
        of = selection.of(line, dataset).set_index("column")
        if of.empty and line != selection.main(line.model):
            continue
        cells = {c: joined(of, c, known.get((line.model, c))) for c in columns}
        title = row_title(selection, line)
        rows.append(Row((title, *parts[line.model]), cells, line.model))
    rows.sort(key=lambda row: (row.labels[1] != "linear", row.labels[2]))
    also = (
        " Published: the ablation's own figures for the two mixed models, Table 12 for the others."
        if known
        else ""
    )
    return Table(
        name=f"ablation_{slug(dataset)}",
        title=f"Ablation of architecture and activation: {dataset_title(dataset)}",
        caption=f"Macro accuracy in percent.{also}",
        heads=("model", "architecture", "activation"),
        columns=plain_columns(selection, columns),
        rows=tuple(rows),
    )


def ablated(selection: Selection) -> list[str]:
    """Datasets of the ablation tables: ImageNet with the eleven, and where there are results."""
    mixed = set(published.ablation_parts()) - set(SIX)
    found = set(selection.cells.dataset[selection.cells.model.isin(mixed)])
    if published.ABLATED_ON in selection.eleven and selection.wanted.models is None:
        found.add(published.ABLATED_ON)
    return [name for name in selection.datasets if name in found]

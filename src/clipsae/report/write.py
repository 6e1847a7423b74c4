"""The report's files. Each is written aside and renamed, so that a reader never sees half a one."""

import json
from pathlib import Path

import matplotlib
import pandas as pd

from clipsae.report.formats import to_csv, to_latex, to_markdown
from clipsae.report.missing import ALL, Missing
from clipsae.report.names import dataset_title, model_title
from clipsae.report.page import page
from clipsae.report.plots import STYLE
from clipsae.report.report import Report
from clipsae.store.files import write_text

INDEX = "index.html"
MANIFEST = "files.json"  # what the report consists of: the next one removes what it does not renew


def write_report(report: Report, folder: Path | str) -> Path:
    """Write all files of a report into `folder`; those of an earlier report are replaced.

    `index.html`, `missing.md`, `tables.md`, `cells.csv`, `tables/<name>.{md,csv,tex}`,
    `plots/<name>.pdf`.

    Returns:
        the page's path.
    """
    folder = Path(folder)
    texts = {
        INDEX: page(report),
        "missing.md": missing_page(report),
        "tables.md": "\n".join(to_markdown(table) for table in report.tables),
        "cells.csv": _cells(report),
    }
    for table in report.tables:
        texts[f"tables/{table.name}.md"] = to_markdown(table)
        texts[f"tables/{table.name}.csv"] = to_csv(table)
        texts[f"tables/{table.name}.tex"] = to_latex(table)
    names = [*texts, *(f"plots/{plot.name}.pdf" for plot in report.plots)]
    for part in ("tables", "plots"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    _remove_stale(folder, names)
    for name, text in texts.items():
        write_text(folder / name, text)
    for plot in report.plots:
        path = folder / "plots" / f"{plot.name}.pdf"
        aside = path.with_name(f".{path.name}.tmp")
        with matplotlib.rc_context(STYLE):
            plot.figure.savefig(aside, format="pdf", metadata={"CreationDate": None})
        aside.replace(path)
    write_text(folder / MANIFEST, json.dumps(sorted(names), indent=1) + "\n")
    return folder / INDEX


def missing_page(report: Report) -> str:
    """Gaps and the commands that fill them, as Markdown."""
    lines = ["# What is missing", ""]
    if report.missing:
        lines += [f"{len(report.missing)} commands fill the missing cells.", ""]
        lines += _gaps(report.missing)
    else:
        lines += ["Nothing: every expected cell has a figure.", ""]
    if report.fewer:
        lines += ["## Fewer seeds than the model's other datasets", "", *_gaps(report.fewer)]
    return "\n".join(lines)


def _gaps(gaps: list[Missing]) -> list[str]:
    rows = [
        f"| {model_title(gap.model)} | {dataset_title(gap.dataset)} | "
        f"{'everything' if gap.what == ALL else gap.what} |".replace("_", "\\_")
        for gap in gaps
    ]
    head = ["| model | dataset | missing |", "| --- | --- | --- |"]
    return [*head, *rows, "", "```bash", *(gap.command for gap in gaps), "```", ""]


def _cells(report: Report) -> str:
    """All figures of all tables, a line each."""
    rows = [
        {
            "table": table.name,
            "row": " / ".join(row.labels),
            "column": column.title,
            "ours": cell.ours,
            "std": cell.std,
            "seeds": cell.seeds or None,
            "published": cell.printed or None,
            "difference": cell.difference,
        }
        for table in report.tables
        for row in table.rows
        for column in table.columns
        if (cell := row.cells.get(column.key)) is not None
    ]
    return pd.DataFrame(rows).to_csv(index=False, lineterminator="\n")


def _remove_stale(folder: Path, names: list[str]) -> None:
    """Remove what an earlier report wrote and this one does not."""
    try:
        earlier = json.loads((folder / MANIFEST).read_text())
        stale = {str(name) for name in earlier} - set(names)
    except (OSError, ValueError, TypeError):
        return
    for name in stale:
        path = folder / name
        if path.resolve().is_relative_to(folder.resolve()):
            path.unlink(missing_ok=True)

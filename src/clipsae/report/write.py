"""The report's files: one HTML page that needs nothing beside it, tables and plots. Each file is
written aside and renamed, so that a reader never sees half a one."""

import io
import json
import math
import re
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from xml.sax.saxutils import quoteattr

import matplotlib
import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.figure import Figure

from clipsae.evaluation.numbers import Number
from clipsae.report import published
from clipsae.report.missing import ALL, Missing
from clipsae.report.names import dataset_title, model_style, model_title
from clipsae.report.noise import RULE
from clipsae.report.plots import INK, STYLE
from clipsae.report.report import Report
from clipsae.report.table import Row, Table, to_csv, to_latex, to_markdown
from clipsae.store.files import write_text

INDEX = "index.html"
MANIFEST = "files.json"  # what the report consists of: the next one removes what it does not renew
_TEMPLATE = Path(__file__).parent / "template"


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
        for end, write in (("md", to_markdown), ("csv", to_csv), ("tex", to_latex)):
            texts[f"tables/{table.name}.{end}"] = write(table)
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
    rows = []
    for table in report.tables:
        for row in table.rows:
            for column in table.columns:
                if column.key in row.cells:
                    about = {"table": table.name, "row": " / ".join(row.labels)}
                    about["column"] = column.label
                    rows.append({**about, **row.cells[column.key].record()})
    return pd.DataFrame(rows).to_csv(index=False, lineterminator="\n")


# --- the page ---


def page(report: Report) -> str:
    """HTML with styles, script and plots inside; it asks for nothing from anywhere."""
    selection = report.selection
    environment = Environment(
        loader=FileSystemLoader(_TEMPLATE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    lines = (*selection.lines, *selection.ablated, *selection.baselines)
    models = tuple(dict.fromkeys(line.model for line in lines))
    versions = [
        ", ".join(f"{name} {version}" for name, version in sorted(origin["versions"].items()))
        for origin in report.origins
    ]
    return environment.get_template("index.html.j2").render(
        report=report,
        wanted=selection.wanted,
        source=published.SOURCE,
        several_seeds=any(
            frame.seeds.gt(1).any() for frame in (selection.cells, selection.metrics)
        ),
        rule=RULE,
        has_published=any(table.has_published for table in report.tables),
        style=Markup((_TEMPLATE / "style.css").read_text()),
        script=Markup((_TEMPLATE / "sort.js").read_text()),
        made=_time(datetime.now(UTC).timestamp()),
        colours={model: model_style(model, models)[0] for model in models},
        ALL=ALL,
        # The sets of package versions that the results were made with, most frequent first.
        versions=sorted(set(versions) - {""}, key=lambda text: (-versions.count(text), text)),
        cell=_cell,
        svg=lambda plot: Markup(inline_svg(plot.figure, plot.name, plot.title)),
        time=_time,
        model_title=model_title,
        dataset_title=dataset_title,
    )


def _cell(table: Table, row: Row, column: Number) -> dict[str, Any]:
    """What the template needs of a cell: its texts, its value for sorting, whether it is best."""
    cell = row.cell(column)
    value = "" if cell.ours is None or math.isnan(cell.ours) else repr(cell.ours)
    return {**cell.texts(column), "value": value, "best": table.is_best(row, column)}


def inline_svg(figure: Figure, name: str, title: str) -> str:
    """The `<svg>` element of a figure: as wide as its place, text and axes in the page's colour,
    ids of its own, no reference to anything outside.

    Args:
        name: what its ids begin with.
        title: what a screen reader says.
    """
    buffer = io.StringIO()
    with matplotlib.rc_context(STYLE):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r' xmlns(:\w+)?="[^"]*"', "", text)
    text = text.replace("xlink:href", "href").replace(INK, "currentColor")
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = text.replace('href="#', f'href="#{name}-').replace("url(#", f"url(#{name}-")
    size = r'<svg width="[\d.]+pt" height="[\d.]+pt"'
    opening = f'<svg role="img" aria-label={quoteattr(title)}'
    return re.sub(size, lambda _: opening, text, count=1)


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M UTC")

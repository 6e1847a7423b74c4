"""The report as one HTML page that needs nothing beside it."""

import math
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from clipsae.report import published
from clipsae.report.missing import ALL
from clipsae.report.names import dataset_title, model_style, model_title
from clipsae.report.plots import Plot
from clipsae.report.report import Report
from clipsae.report.svg import inline_svg
from clipsae.report.table import Cell, Column, Row, Table, shown

_FOLDER = Path(__file__).parent / "template"


def page(report: Report) -> str:
    """HTML with styles, script and plots inside; it asks for nothing from anywhere."""
    selection = report.selection
    return (
        _environment()
        .get_template("index.html.j2")
        .render(
            report=report,
            wanted=selection.wanted,
            source=published.SOURCE,
            style=Markup((_FOLDER / "style.css").read_text()),
            script=Markup((_FOLDER / "sort.js").read_text()),
            made=_time(datetime.now(UTC).timestamp()),
            colours={
                m: model_style(m, selection.models)[0]
                for m in (*selection.models, *(line.model for line in selection.ablated))
            },
            ALL=ALL,
            versions=_versions(report),
        )
    )


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(_FOLDER),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals.update(
        cell=_cell,
        shown=shown,
        svg=_svg,
        time=_time,
        model_title=model_title,
        dataset_title=dataset_title,
    )
    return environment


def _cell(table: Table, row: Row, column: Column) -> dict[str, Any]:
    """What the template needs of a cell: its texts, its value for sorting, whether it is best."""
    cell = row.cells.get(column.key, Cell())
    value = cell.ours
    return {
        **shown(cell, column),
        "value": "" if value is None or math.isnan(value) else repr(value),
        "best": table.is_best(cell, column),
    }


def _svg(plot: Plot) -> Markup:
    return Markup(inline_svg(plot.figure, plot.name, plot.title))


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M UTC")


def _versions(report: Report) -> list[str]:
    """The sets of package versions that the results were made with, most frequent first."""
    texts = [
        ", ".join(f"{name} {version}" for name, version in sorted(origin["versions"].items()))
        for origin in report.origins
    ]
    return sorted(set(texts) - {""}, key=lambda text: (-texts.count(text), text))

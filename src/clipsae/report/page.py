"""The report as one HTML page that needs nothing beside it."""

import io
import math
import re
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any
from xml.sax.saxutils import quoteattr

import matplotlib
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.figure import Figure

from clipsae.report import published
from clipsae.report.missing import ALL
from clipsae.report.names import dataset_title, model_style, model_title
from clipsae.report.plots import INK, STYLE
from clipsae.report.report import Report
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
        svg=lambda plot: Markup(inline_svg(plot.figure, plot.name, plot.title)),
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


def _versions(report: Report) -> list[str]:
    """The sets of package versions that the results were made with, most frequent first."""
    texts = [
        ", ".join(f"{name} {version}" for name, version in sorted(origin["versions"].items()))
        for origin in report.origins
    ]
    return sorted(set(texts) - {""}, key=lambda text: (-texts.count(text), text))

"""A figure as SVG that lives inside an HTML page, in the reader's colours."""

import io
import re
from xml.sax.saxutils import quoteattr

import matplotlib
from matplotlib.figure import Figure

from clipsae.report.plots import INK, STYLE


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

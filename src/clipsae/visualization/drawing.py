"""What the figures are made of: explicit positions in inches, so that the same input gives the same
file, and no pyplot, so that it works without a display and leaves no state behind.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from clipsae.visualization.references import References

WIDTH = 6.875  # inches: the text of a two-column paper
MARGIN, GAP = 0.06, 0.08
_STYLE = {
    "font.family": "DejaVu Sans",  # comes with matplotlib
    "font.size": 7,
    "axes.linewidth": 0.6,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "pdf.fonttype": 42,
}


@contextmanager
def canvas(height: float) -> Iterator[Figure]:
    """An empty figure, `WIDTH` x height in inches, to draw on within the block."""
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(WIDTH, height))
        FigureCanvasAgg(figure)
        yield figure


def save(figure: Figure, path: Path) -> list[Path]:
    """Write `path` with the suffixes .png (300 dots an inch) and .pdf, the same bytes each time."""
    with mpl.rc_context(_STYLE):
        png, pdf = path.with_name(f"{path.name}.png"), path.with_name(f"{path.name}.pdf")
        figure.savefig(png, dpi=300, metadata={"Software": None})
        figure.savefig(pdf, dpi=300, metadata={"CreationDate": None, "Creator": None})
    return [png, pdf]


def add_axes(figure: Figure, left: float, top: float, width: float, height: float) -> Axes:
    """Axes by their upper left corner, in inches from the left and from the bottom."""
    w, h = figure.get_size_inches()
    return figure.add_axes((left / w, (top - height) / h, width / w, height / h))


def add_picture(
    figure: Figure, left: float, top: float, side: float, image: Tensor, colour: str = "black"
) -> None:
    """An image, uint8 [3, S, S], by its upper left corner and its side, in a frame."""
    axes = add_axes(figure, left, top, side, side)
    axes.imshow(image.permute(1, 2, 0).numpy(), interpolation="nearest")
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_color(colour)
        spine.set_linewidth(0.6 if colour == "black" else 1.2)


def add_text(figure: Figure, x: float, y: float, text: str, **options: object) -> None:
    """Text at inches from the left and from the bottom."""
    w, h = figure.get_size_inches()
    figure.text(x / w, y / h, text, **options)


def add_caption(figure: Figure, x: float, top: float, lines: list[str]) -> None:
    """Centred lines below `top`."""
    # Each line on a baseline of its own: a block's lines move with their letters' heights.
    for number, line in enumerate(lines):
        add_text(figure, x, top - 0.08 - 0.115 * number, line, va="baseline", ha="center")


def about_latent(references: References, latent: int) -> list[str]:
    """How often a latent is active, and the concept that it is named after, if any."""
    found = [f"active on {share(float(references.frequency[latent]))} of the images"]
    if references.concept is not None and references.concept[latent] >= 0:
        k = int(references.concept[latent])
        precision, base = references.concept_precision[latent], references.base[k]
        found.append(
            f"{references.shown.concepts[k]} {share(float(precision))} "
            f"(by chance {share(float(base))})"
        )
    return found


def share(value: float) -> str:
    """A share as percent that is never a misleading 0 %."""
    return "0 %" if value == 0 else "< 0.1 %" if value < 0.001 else f"{100 * value:.1f} %"

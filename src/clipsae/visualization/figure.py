"""The figure of one image: its latents as spikes, where the strongest are active, and the
reference images of those (Figures 6-11 of the paper).
"""

import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from clipsae.visualization.drawing import (
    GAP,
    MARGIN,
    WIDTH,
    about_latent,
    add_axes,
    add_caption,
    add_picture,
    add_text,
    canvas,
)
from clipsae.visualization.references import References
from clipsae.visualization.view import View, darkened

COLOURS = ("#d55e00", "#0072b2", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")  # Okabe and Ito
_GREY = "#bbbbbb"
_HEAD, _BELOW_HEAD = 1.45, 0.2  # image and spikes, and the space below
_TITLE, _CAPTION = 0.2, 0.5  # above and below a row of images
_RASTER = 2000  # spikes beyond which the PDF holds them as pixels


@dataclass(frozen=True)
class Panel:
    """One SAE's part of a figure."""

    view: View
    references: References
    image_of: Callable[[int], Tensor]  # a reference image, uint8 [3, S, S], by its index
    names: Sequence[str] | None = None  # of the images, by index; None: they have none


def draw(
    image: Tensor,
    title: str,
    panels: Mapping[str, Panel],
    *,
    references: int = 5,
    mask_references: bool = False,
    own_index: int | None = None,
) -> Figure:
    """Draw one image through one or several SAEs, one below the other.

    Args:
        image: uint8 [3, S, S].
        title: what the image is; where it is too long, its end is shown.
        panels: by the model's name.
        references: how many reference images of each marked latent.
        mask_references: darken them, too, where the latent is not active.
        own_index: of the image in the dataset that the references come from: it is left out of
            them.
    """
    cell = (WIDTH - 2 * MARGIN - references * GAP) / (references + 1)
    row = _TITLE + cell + _CAPTION
    heights = [_HEAD + _BELOW_HEAD + row * len(panel.view.marked) for panel in panels.values()]
    height = sum(heights) + 2 * MARGIN
    with canvas(height) as figure:
        top = height - MARGIN
        for (name, panel), needed in zip(panels.items(), heights, strict=True):
            _head(figure, top, cell, image, title, name, panel.view)
            below = top - _HEAD - _BELOW_HEAD
            for rank, latent in enumerate(panel.view.marked):
                _row(
                    figure,
                    below - rank * row,
                    cell,
                    image,
                    panel,
                    rank,
                    latent,
                    _others(panel.references, latent, references, own_index),
                    mask_references,
                )
            top -= needed
    return figure


def _head(
    figure: Figure, top: float, cell: float, image: Tensor, title: str, name: str, view: View
) -> None:
    side = min(_HEAD - _TITLE, 1.2)
    title = ending(title, 28)
    add_text(figure, MARGIN, top - 0.04, title, va="top", weight="bold")
    add_picture(figure, MARGIN, top - _TITLE, side, image)
    left = MARGIN + side + 0.62
    axes = add_axes(figure, left, top - _TITLE, WIDTH - left - MARGIN - 0.05, side - 0.08)
    add_text(figure, left, top - 0.04, name, va="top", weight="bold")
    _spikes(axes, view)


def _spikes(axes: Axes, view: View) -> None:
    means = view.means
    latents = len(means)
    active = means.nonzero().squeeze(1)
    for chosen, colour, order in (
        (active[~view.shown[active]], _GREY, 1),
        (active[view.shown[active]], "#333333", 2),
    ):
        if len(chosen):
            axes.vlines(
                chosen.numpy(),
                0,
                means[chosen].numpy(),
                color=colour,
                linewidth=0.5,
                zorder=order,
                rasterized=len(active) > _RASTER,
            )
    highest = max([means.max().item(), 1e-12])
    axes.set_xlim(-0.01 * latents, 1.01 * latents)
    axes.set_ylim(min(0, means.min().item() * 1.05), highest * 1.3)
    axes.axhline(0, color="black", linewidth=0.6)
    placed: list[tuple[float, float]] = []
    for rank, latent in enumerate(view.marked):
        value, colour = means[latent].item(), COLOURS[rank % len(COLOURS)]
        axes.vlines(latent, 0, value, color=colour, linewidth=1.4, zorder=3)
        axes.plot(latent, value, "o", color=colour, markersize=3, zorder=4)
        x, y = latent / latents, value / (highest * 1.3)
        # Labels that would lie on each other: the later one moves up, or down from the top.
        while any(abs(x - u) < 0.08 and abs(y - v) < 0.1 for u, v in placed):
            y += 0.1
        placed.append((x, y))
        right = x > 0.85
        axes.annotate(
            f"{latent}",
            (latent, value),
            xytext=(x - 0.008 if right else x + 0.008, y + 0.02),
            textcoords="axes fraction",
            ha="right" if right else "left",
            va="bottom",
            color=colour,
            weight="bold",
            annotation_clip=False,
        )
    if not view.marked:
        axes.text(0.5, 0.8, "no latent passes the filter", transform=axes.transAxes, ha="center")
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel("latent", labelpad=1)
    axes.set_ylabel("mean activation", labelpad=2)
    axes.tick_params(length=2, pad=1.5)
    axes.locator_params(axis="y", nbins=4)


def _others(
    references: References, latent: int, wanted: int, own_index: int | None
) -> list[tuple[int, int]]:
    """(slot, image index) of the first reference images that are not the image itself."""
    index = references.index[latent].tolist()
    others = [(slot, i) for slot, i in enumerate(index) if i >= 0 and i != own_index]
    return others[:wanted]


def _row(
    figure: Figure,
    top: float,
    cell: float,
    image: Tensor,
    panel: Panel,
    rank: int,
    latent: int,
    others: list[tuple[int, int]],
    mask: bool,
) -> None:
    references, view = panel.references, panel.view
    grid = references.shown.grid
    colour = COLOURS[rank % len(COLOURS)]
    said = f"latent {latent}"
    add_text(figure, MARGIN, top - 0.06, said, va="top", color=colour, weight="bold")
    left = MARGIN + cell + GAP
    add_text(
        figure,
        left,
        top - 0.06,
        ", ".join(about_latent(references, latent)),
        va="top",
        color="#444444",
    )
    under = top - _TITLE - cell - 0.04
    own = darkened(image, view.patches[rank], grid)
    add_picture(figure, MARGIN, top - _TITLE, cell, own, colour)
    patches = int((view.patches[rank] > 0).sum())
    own_caption = [f"{view.means[latent]:.3g}", f"{patches} of {view.patches.shape[1]} patches"]
    add_caption(figure, MARGIN + cell / 2, under, own_caption)
    for column, (slot, index) in enumerate(others):
        at = left + column * (cell + GAP)
        shown = panel.image_of(index)
        if mask:
            shown = darkened(shown, references.maps[latent, slot], grid)
        add_picture(figure, at, top - _TITLE, cell, shown)
        label = references.shown.classnames[int(references.label[latent, slot])]
        value = f"{references.values[latent, slot]:.3g}"
        letters = round(cell / 0.058)
        lines = textwrap.wrap(label, width=letters, max_lines=2, placeholder=" …")
        name = f"image {index}" if panel.names is None else ending(panel.names[index], letters)
        add_caption(figure, at + cell / 2, under, [value, *lines, name])


def ending(text: str, letters: int) -> str:
    """A text that is no longer than that; of a longer one the end, which tells files apart."""
    return text if len(text) <= letters else f"…{text[1 - letters :]}"

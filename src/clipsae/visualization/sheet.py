"""A sheet of several latents: each a row of its reference images, dark where it is not active."""

import textwrap
from collections.abc import Callable, Sequence

import torch
from matplotlib.figure import Figure
from torch import Tensor

from clipsae.visualization.drawing import (
    GAP,
    MARGIN,
    WIDTH,
    about_latent,
    add_picture,
    add_text,
    canvas,
)
from clipsae.visualization.references import References
from clipsae.visualization.view import darkened

_TEXT = 1.5  # inches, left of the images
_LETTERS = 26  # of a line there


def leading_latents(references: References, n: int, *, max_frequency: float = 0.5) -> list[int]:
    """The n latents that say most on their best image, by the largest token mean; of equals the
    smaller index. Those active on a larger share of the images than `max_frequency` are left out:
    they are everywhere."""
    kept = (references.frequency > 0) & (references.frequency <= max_frequency)
    best = references.values[:, 0].masked_fill(~kept, -torch.inf)
    order = best.sort(descending=True, stable=True).indices[: min(n, int(kept.sum()))]
    return order.tolist()


def draw_sheet(
    references: References,
    latents: Sequence[int],
    image_of: Callable[[int], Tensor],
    title: str,
    *,
    images: int = 5,
) -> Figure:
    """Draw the reference images of latents.

    Args:
        latents: from top to bottom.
        image_of: a reference image, uint8 [3, S, S], by its index.
        images: of a latent, at most.
    """
    cell = (WIDTH - 2 * MARGIN - _TEXT) / images - GAP
    height = 2 * MARGIN + 0.2 + len(latents) * (cell + GAP)
    with canvas(height) as figure:
        top = height - MARGIN
        add_text(figure, MARGIN, top - 0.04, title, va="top", weight="bold")
        for row, latent in enumerate(latents):
            at = top - 0.2 - row * (cell + GAP)
            said = [f"latent {latent}", *_about(references, latent)]
            for line, words in enumerate(said):
                weight = "bold" if line == 0 else "normal"
                add_text(figure, MARGIN, at - 0.13 - 0.12 * line, words, weight=weight)
            index = references.index[latent, :images].tolist()
            for slot, image in enumerate(index):
                if image < 0:
                    continue
                shown = darkened(
                    image_of(image), references.maps[latent, slot], references.shown.grid
                )
                add_picture(figure, MARGIN + _TEXT + slot * (cell + GAP), at, cell, shown)
    return figure


def _about(references: References, latent: int) -> list[str]:
    label = references.shown.classnames[int(references.top_label[latent])]
    said = [*about_latent(references, latent), f"label: {label}"]
    return [line for words in said for line in textwrap.wrap(words, _LETTERS)]

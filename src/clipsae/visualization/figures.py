"""Figures of latents: one image through SAEs (Figures 6-11 of the paper), and a sheet of the
reference images of several latents.

Positions are explicit, in inches, so that the same input gives the same file, and pyplot is not
used: no display is needed, and no state is left behind.

T tokens of an image, P = T - 1 patches, M latents, S image side.
"""

import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib as mpl
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor, nn

from clipsae.clip import FrozenCLIP
from clipsae.evaluation.passes import pool_codes, whole_codes
from clipsae.evaluation.ranking import top_latents
from clipsae.sae import SAE
from clipsae.visualization.references import References

DARK = 30 / 255  # brightness of the patches where a latent is not active
WIDTH = 6.875  # inches: the text of a two-column paper
MARGIN, GAP = 0.06, 0.08
COLOURS = ("#d55e00", "#0072b2", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")  # Okabe and Ito
_GREY = "#bbbbbb"
_HEAD, _BELOW_HEAD = 1.45, 0.2  # image and spikes, and the space below
_TITLE, _CAPTION = 0.2, 0.5  # above and below a row of images
_RASTER = 2000  # spikes beyond which the PDF holds them as pixels
_TEXT, _LETTERS = 1.5, 26  # left of a sheet's images: inches, and letters of a line
_STYLE = {
    "font.family": "DejaVu Sans",  # comes with matplotlib
    "font.size": 7,
    "axes.linewidth": 0.6,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "pdf.fonttype": 42,
    "text.parse_math": False,  # names and files may have dollar signs
}


@dataclass(frozen=True)
class ImageCodes:
    """One image's codes by one SAE.

    Attributes:
        means: float32 [M], codes averaged over all tokens, the class token included.
        shown: BoolTensor [M], the latents that pass the filter.
        marked: the latents with the largest positive means among those, descending.
        patches: float32 [marked, P], their codes on the patches.
    """

    means: Tensor
    shown: Tensor
    marked: list[int]
    patches: Tensor


@torch.no_grad()
def image_codes(clip: FrozenCLIP, sae: SAE, image: Tensor, shown: Tensor, top: int) -> ImageCodes:
    """Encode one image and mark its strongest latents.

    Args:
        sae: in eval mode, on the device of `clip`.
        image: uint8 [3, S, S].
        shown: BoolTensor [M], the latents that may be marked.
        top: how many are marked, at most.
    """
    codes = whole_codes(clip, sae, clip.prefix(clip.normalize(image[None])))
    means = pool_codes(codes)[0].cpu()
    allowed = means.masked_fill(~shown, 0)
    best = top_latents(allowed[None], min(top, len(means)))[0]
    marked = [int(m) for m in best if allowed[m] > 0]
    patches = codes[0, clip.prefix_tokens :][:, marked].T.float().cpu()
    return ImageCodes(means, shown, marked, patches)


def passes_filter(
    references: References, kind: str, *, max_frequency: float, max_strength: float
) -> Tensor:
    """The latents that are worth showing, BoolTensor [M].

    Args:
        kind: "frequency" leaves out those active on a larger share of the images than
            `max_frequency`: they say little about any one image. "strength" is the released code's
            filter: it leaves out those whose mean activation, over the images where they are
            active, is above `max_strength` (strong rare latents, too). "none" leaves out none.

    Raises:
        ValueError: another filter.
    """
    if kind == "frequency":
        return references.frequency <= max_frequency
    if kind == "strength":
        return references.strength <= max_strength
    if kind == "none":
        return torch.ones_like(references.frequency, dtype=torch.bool)
    raise ValueError(f"filter={kind!r}: expected one of frequency, strength, none")


def leading_latents(references: References, n: int, *, max_frequency: float = 0.5) -> list[int]:
    """The n latents with the largest token mean on their best image; of equals the smaller index.
    Those active on a larger share of the images than `max_frequency` are left out."""
    kept = (references.frequency > 0) & (references.frequency <= max_frequency)
    best = references.values[:, 0].masked_fill(~kept, -torch.inf)
    order = best.sort(descending=True, stable=True).indices[: min(n, int(kept.sum()))]
    return order.tolist()


def darkened(image: Tensor, patches: Tensor, grid: tuple[int, int]) -> Tensor:
    """An image whose patches are dark where a latent is not active.

    Args:
        image: uint8 [3, S, S].
        patches: [P], the latent's codes, or anything that is above 0 where it is active.
        grid: (rows, columns) of patches.

    Returns:
        uint8 [3, S, S]; patches are enlarged to the nearest pixels.
    """
    mask = (patches > 0).float().view(1, 1, *grid)
    mask = nn.functional.interpolate(mask, image.shape[-2:], mode="nearest")[0]
    return (image * (DARK + (1 - DARK) * mask)).round().to(torch.uint8)


@dataclass(frozen=True)
class Panel:
    """One SAE's part of a figure."""

    codes: ImageCodes
    references: References
    image_of: Callable[[int], Tensor]  # a reference image, uint8 [3, S, S], by its index
    names: Sequence[str] | None = None  # of the images, by index; None: they have none
    about: Mapping[int, str] = field(default_factory=dict)  # more about latents, by their number


def draw_image(
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
        title: of the image; where it is too long, its end is shown.
        panels: by the model's name.
        references: how many reference images of each marked latent.
        mask_references: darken them, too, where the latent is not active.
        own_index: of the image in the dataset that the references come from: it is left out of
            them.
    """
    cell = (WIDTH - 2 * MARGIN - references * GAP) / (references + 1)
    row = _TITLE + cell + _CAPTION
    heights = [_HEAD + _BELOW_HEAD + row * len(panel.codes.marked) for panel in panels.values()]
    height = sum(heights) + 2 * MARGIN
    with _canvas(height) as figure:
        top = height - MARGIN
        for (name, panel), needed in zip(panels.items(), heights, strict=True):
            _head(figure, top, image, title, name, panel.codes)
            for rank, latent in enumerate(panel.codes.marked):
                index = panel.references.index[latent].tolist()
                slots = [slot for slot, i in enumerate(index) if i >= 0 and i != own_index]
                under = top - _HEAD - _BELOW_HEAD - rank * row
                _row(figure, under, cell, image, panel, rank, slots[:references], mask_references)
            top -= needed
    return figure


def _head(
    figure: Figure, top: float, image: Tensor, title: str, name: str, codes: ImageCodes
) -> None:
    side = min(_HEAD - _TITLE, 1.2)
    _add_text(figure, MARGIN, top - 0.04, _ending(title, 28), va="top", weight="bold")
    _add_picture(figure, MARGIN, top - _TITLE, side, image)
    left = MARGIN + side + 0.62
    axes = _add_axes(figure, left, top - _TITLE, WIDTH - left - MARGIN - 0.05, side - 0.08)
    _add_text(figure, left, top - 0.04, name, va="top", weight="bold")
    _spikes(axes, codes)


def _spikes(axes: Axes, codes: ImageCodes) -> None:
    means = codes.means
    latents = len(means)
    active = means.nonzero().squeeze(1)
    for chosen, colour, order in (
        (active[~codes.shown[active]], _GREY, 1),
        (active[codes.shown[active]], "#333333", 2),
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
    for rank, latent in enumerate(codes.marked):
        value, colour = means[latent].item(), COLOURS[rank % len(COLOURS)]
        axes.vlines(latent, 0, value, color=colour, linewidth=1.4, zorder=3)
        axes.plot(latent, value, "o", color=colour, markersize=3, zorder=4)
        x, y = latent / latents, value / (highest * 1.3)
        # Labels that would lie on each other: the later one moves up.
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
    if not codes.marked:
        axes.text(0.5, 0.8, "no latent passes the filter", transform=axes.transAxes, ha="center")
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel("latent", labelpad=1)
    axes.set_ylabel("mean activation", labelpad=2)
    axes.tick_params(length=2, pad=1.5)
    axes.locator_params(axis="y", nbins=4)


def _row(
    figure: Figure,
    top: float,
    cell: float,
    image: Tensor,
    panel: Panel,
    rank: int,
    slots: list[int],
    mask: bool,
) -> None:
    """A marked latent on the image itself and on the reference images in `slots`."""
    references, codes = panel.references, panel.codes
    latent, patches = codes.marked[rank], codes.patches[rank]
    grid, colour = references.source.grid, COLOURS[rank % len(COLOURS)]
    left, under = MARGIN + cell + GAP, top - _TITLE - cell - 0.04
    name = f"latent {latent}"
    _add_text(figure, MARGIN, top - 0.06, name, va="top", color=colour, weight="bold")
    facts = ", ".join(_facts(references, latent))
    if latent in panel.about:
        facts = f"{panel.about[latent]}; {facts}"
    _add_text(figure, left, top - 0.06, facts, va="top", color="#444444")
    _add_picture(figure, MARGIN, top - _TITLE, cell, darkened(image, patches, grid), colour)
    active = f"{int((patches > 0).sum())} of {len(patches)} patches"
    _add_caption(figure, MARGIN + cell / 2, under, [f"{codes.means[latent]:.3g}", active])
    letters = round(cell / 0.058)
    for column, slot in enumerate(slots):
        at, index = left + column * (cell + GAP), int(references.index[latent, slot])
        shown = panel.image_of(index)
        if mask:
            shown = darkened(shown, references.maps[latent, slot], grid)
        _add_picture(figure, at, top - _TITLE, cell, shown)
        label = references.source.classnames[int(references.label[latent, slot])]
        lines = textwrap.wrap(label, width=letters, max_lines=2, placeholder=" …")
        name = f"image {index}" if panel.names is None else _ending(panel.names[index], letters)
        value = f"{references.values[latent, slot]:.3g}"
        _add_caption(figure, at + cell / 2, under, [value, *lines, name])


def draw_sheet(
    references: References,
    latents: Sequence[int],
    image_of: Callable[[int], Tensor],
    title: str,
    *,
    images: int = 5,
) -> Figure:
    """Draw a row of reference images for each latent, dark where it is not active.

    Args:
        latents: from top to bottom.
        image_of: a reference image, uint8 [3, S, S], by its index.
        images: of a latent, at most.
    """
    source = references.source
    cell = (WIDTH - 2 * MARGIN - _TEXT) / images - GAP
    height = 2 * MARGIN + 0.2 + len(latents) * (cell + GAP)
    with _canvas(height) as figure:
        top = height - MARGIN
        _add_text(figure, MARGIN, top - 0.04, title, va="top", weight="bold")
        for row, latent in enumerate(latents):
            at = top - 0.2 - row * (cell + GAP)
            label = f"label: {source.classnames[int(references.top_label[latent])]}"
            facts = [*_facts(references, latent), label]
            lines = [line for fact in facts for line in textwrap.wrap(fact, _LETTERS)]
            for number, line in enumerate([f"latent {latent}", *lines]):
                weight = "normal" if number else "bold"
                _add_text(figure, MARGIN, at - 0.13 - 0.12 * number, line, weight=weight)
            for slot, image in enumerate(references.index[latent, :images].tolist()):
                if image >= 0:
                    shown = darkened(image_of(image), references.maps[latent, slot], source.grid)
                    _add_picture(figure, MARGIN + _TEXT + slot * (cell + GAP), at, cell, shown)
    return figure


def save(figure: Figure, path: Path) -> list[Path]:
    """Write `path` with the suffixes .png (300 dots an inch) and .pdf, the same bytes each time."""
    with mpl.rc_context(_STYLE):
        png, pdf = path.with_name(f"{path.name}.png"), path.with_name(f"{path.name}.pdf")
        figure.savefig(png, dpi=300, metadata={"Software": None})
        figure.savefig(pdf, dpi=300, metadata={"CreationDate": None, "Creator": None})
    return [png, pdf]


@contextmanager
def _canvas(height: float) -> Iterator[Figure]:
    """An empty figure, `WIDTH` x height in inches, to draw on within the block."""
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(WIDTH, height))
        FigureCanvasAgg(figure)
        yield figure


def _add_axes(figure: Figure, left: float, top: float, width: float, height: float) -> Axes:
    """Axes by their upper left corner, in inches from the left and from the bottom."""
    w, h = figure.get_size_inches()
    return figure.add_axes((left / w, (top - height) / h, width / w, height / h))


def _add_picture(
    figure: Figure, left: float, top: float, side: float, image: Tensor, colour: str = "black"
) -> None:
    """An image, uint8 [3, S, S], by its upper left corner and its side, in a frame."""
    axes = _add_axes(figure, left, top, side, side)
    axes.imshow(image.permute(1, 2, 0).numpy(), interpolation="nearest")
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_color(colour)
        spine.set_linewidth(0.6 if colour == "black" else 1.2)


def _add_text(figure: Figure, x: float, y: float, text: str, **options: object) -> None:
    """Text at inches from the left and from the bottom."""
    w, h = figure.get_size_inches()
    figure.text(x / w, y / h, text, **options)


def _add_caption(figure: Figure, x: float, top: float, lines: list[str]) -> None:
    """Centred lines below `top`."""
    # Each line on a baseline of its own: a block's lines move with their letters' heights.
    for number, line in enumerate(lines):
        _add_text(figure, x, top - 0.08 - 0.115 * number, line, va="baseline", ha="center")


def _facts(references: References, latent: int) -> list[str]:
    """How often a latent is active, and the concept that it is named after, if any."""
    found = [f"active on {percent(float(references.frequency[latent]))} of the images"]
    if references.concept is not None and references.concept[latent] >= 0:
        k = int(references.concept[latent])
        precision, base = references.concept_precision[latent], references.base[k]
        found.append(
            f"{references.source.concepts[k]} {percent(float(precision))} "
            f"(by chance {percent(float(base))})"
        )
    return found


def percent(share: float) -> str:
    """A share as percent that is never a misleading 0 %."""
    return "0 %" if share == 0 else "< 0.1 %" if share < 0.001 else f"{100 * share:.1f} %"


def _ending(text: str, letters: int) -> str:
    """The text, or where it is longer its end, which tells files apart."""
    return text if len(text) <= letters else f"…{text[1 - letters :]}"

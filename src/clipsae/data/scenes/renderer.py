"""Scenes to images, many at once, in plain torch.

Letters: N scenes, O = 3 object slots, S = 64 pixels, n scenes of one group (one shape, pattern
or background).
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from clipsae.data.scenes.backgrounds import BACKGROUND, noise_tiles
from clipsae.data.scenes.shapes import PATTERN_MIX, SHAPE_DISTANCE
from clipsae.data.scenes.world import (
    BACKGROUNDS,
    COLOURS,
    IMAGE_SIZE,
    PATTERNS,
    SHAPES,
    SLOTS,
    Scenes,
)

_CHUNK = 32  # scenes at a time: the working set (a few [32, 64, 64] planes) stays in the L2 cache


def _second_colour(rgb: Tensor) -> Tensor:
    """A darker shade of light colours, a lighter one of dark colours: [..., 3] -> [..., 3]."""
    dark = (rgb * torch.tensor([0.3, 0.59, 0.11])).sum(-1, keepdim=True) < 0.26
    return torch.where(dark, 0.35 * rgb + 0.58, 0.36 * rgb)


@functools.cache
def _constants() -> tuple[Tensor, ...]:
    """Pixel centres x, y [S, S]; colours [C, 3]; second colours [C, 3]; backgrounds [2, B, 3]."""
    axis = torch.arange(IMAGE_SIZE) + 0.5
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    first = torch.tensor(list(COLOURS.values()))
    ends = [[BACKGROUND[b][k] for b in BACKGROUNDS] for k in (1, 2)]
    return x.contiguous(), y.contiguous(), first, _second_colour(first), torch.tensor(ends)


def _grouped(labels: Tensor, n_labels: int) -> list[tuple[int, Tensor]]:
    """The labels that occur, each with the rows that carry it."""
    return [(k, i) for k in range(n_labels) if len(i := (labels == k).nonzero()[:, 0])]


def _draw_background(s: Scenes) -> Tensor:
    x, y, _, _, ends = _constants()
    t = torch.empty(len(s), IMAGE_SIZE, IMAGE_SIZE)
    for k, rows in _grouped(s.background, len(BACKGROUNDS)):
        t[rows] = BACKGROUND[BACKGROUNDS[k]][0](x, y, s.look[rows])
    a, b = ends[0][s.background][:, :, None, None], ends[1][s.background][:, :, None, None]
    return torch.addcmul(a, t[:, None], b - a)


def _draw_objects(s: Scenes, slot: int) -> tuple[Tensor, Tensor, Tensor]:
    """One object of each scene: mask [n, S, S], shadow [n, S, S], colours [n, 3, S, S]."""
    px, py, first, second, _ = _constants()
    r, angle = s.radius[:, slot, None, None], s.angle[:, slot, None, None]
    cos, sin = torch.cos(angle) / r, torch.sin(angle) / r
    dx, dy = px - s.x[:, slot, None, None], py - s.y[:, slot, None, None]
    x, y = torch.addcmul(dx * cos, dy, sin), torch.addcmul(dy * cos, dx, -sin)
    d = torch.empty_like(x)
    for k, rows in _grouped(s.shape[:, slot], len(SHAPES)):
        d[rows] = SHAPE_DISTANCE[SHAPES[k]](x[rows], y[rows])
    mask = (0.5 - d * r).clamp(0, 1)
    shadow = (0.6 - d * r * 0.3).clamp(0, 1)
    t = torch.zeros_like(x)
    for k, rows in _grouped(s.pattern[:, slot], len(PATTERNS)):
        if PATTERNS[k] in PATTERN_MIX:
            at = s.phase[rows, slot, :, None, None]
            t[rows] = PATTERN_MIX[PATTERNS[k]](
                x[rows] + at[:, 0], y[rows] + at[:, 1], d[rows], r[rows]
            )
    a = first[s.colour[:, slot]][:, :, None, None]
    b = second[s.colour[:, slot]][:, :, None, None]
    return mask, shadow, torch.addcmul(a, t[:, None], b - a)


def _render_chunk(s: Scenes) -> tuple[Tensor, Tensor]:
    image = _draw_background(s)
    coverage = torch.zeros(len(s), SLOTS, IMAGE_SIZE, IMAGE_SIZE)
    for slot in range(SLOTS):
        rows = (s.count > slot).nonzero()[:, 0]
        if not len(rows):
            break
        mask, shadow, colours = _draw_objects(s if len(rows) == len(s) else s[rows], slot)
        below = image[rows]
        # The light comes from the upper left: the shadow falls 2 pixels right and down.
        below[:, :, 2:, 2:] *= 1 - 0.45 * shadow[:, None, :-2, :-2]
        image[rows] = torch.addcmul(below, mask[:, None], colours - below)
        coverage[rows, slot] = mask
    # Lighting: brightness 0.86..1.1 with a gradient of up to +-14 % across the image.
    x, y, *_ = _constants()
    bright, slope, turn, noise, at = (s.look[:, k, None, None] for k in range(7, 12))
    gx, gy = slope * torch.cos(6.2831853 * turn), slope * torch.sin(6.2831853 * turn)
    light = 0.86 + 0.24 * bright + (gx * (x - 32) + gy * (y - 32)) * (0.14 / 32)
    image *= light[:, None]
    size = 3 * IMAGE_SIZE**2
    runs = noise_tiles()["pixel"].unfold(0, size, 1)
    begin = (at.flatten() * len(runs)).long()
    image += runs[begin].view_as(image) * (0.01 + 0.03 * noise)[:, None]
    return image.clamp_(0, 1).mul_(255).round_().to(torch.uint8), coverage


def render(scenes: Scenes) -> tuple[Tensor, Tensor]:
    """Draw N scenes.

    Returns:
        images [N, 3, S, S] uint8 (sRGB) and coverage [N, O, S, S] float32 in [0, 1]: how much
        of a pixel each object covers.
    """
    parts = [_render_chunk(scenes[i : i + _CHUNK]) for i in range(0, len(scenes), _CHUNK)]
    if not parts:
        return (
            torch.empty(0, 3, IMAGE_SIZE, IMAGE_SIZE, dtype=torch.uint8),
            torch.empty(0, SLOTS, IMAGE_SIZE, IMAGE_SIZE),
        )
    images, coverage = zip(*parts, strict=True)
    return torch.cat(images), torch.cat(coverage)


def patch_coverage(coverage: Tensor, grid: int) -> Tensor:
    """Mean coverage of each patch of a grid x grid: [N, O, S, S] -> [N, O, grid * grid].

    Where the grid does not divide S, a patch is the whole pixels that it touches.
    """
    n, o, s, _ = coverage.shape
    if s % grid:
        return adaptive_avg_pool2d(coverage, grid).flatten(2)
    return coverage.view(n, o, grid, s // grid, grid, s // grid).mean((3, 5)).flatten(2)

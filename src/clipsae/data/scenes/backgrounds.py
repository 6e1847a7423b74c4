"""Backgrounds: procedural textures that mix two colours.

Letters: n scenes that share a background, S = 64 pixels.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from clipsae.data.scenes.world import IMAGE_SIZE, uniforms

_TILE = 256  # side of the noise tiles, in pixels

# --- noise tiles, made once: a scene cuts its window out at a place of its own ---


@functools.cache
def noise_tiles() -> dict[str, Tensor]:
    """Fixed noise [256, 256], tiling seamlessly: `fine` is white (variance 1), the others are
    smoothed along x, y or both and scaled to variance 1; `pixel` [3 * 2^17] is white."""
    u = uniforms(0, 0, torch.arange(_TILE), 2 * _TILE)
    gauss = torch.sqrt(-2 * torch.log(u[:, :_TILE] + 1e-7)) * torch.cos(6.2831853 * u[:, _TILE:])

    def smooth(noise: Tensor, wide: int, high: int) -> Tensor:
        for axis, width in ((1, wide), (0, high)):
            for _ in range(2):  # twice a box: nearly a Gaussian
                noise = sum(torch.roll(noise, s, axis) for s in range(-width, width + 1))
        return noise / noise.std()

    tiles = {
        "fine": gauss,
        "blades": smooth(gauss, 0, 3),
        "grain": smooth(gauss, 9, 0),
        "soft": smooth(gauss, 5, 4),
        "blobs": smooth(gauss, 3, 3),
    }
    # Two copies each way, so that a window never has to wrap.
    tiles = {
        k: v.repeat(2, 2)[: _TILE + IMAGE_SIZE, : _TILE + IMAGE_SIZE] for k, v in tiles.items()
    }
    rows = uniforms(0, 1, torch.arange(384), 1024)
    rest = uniforms(0, 2, torch.arange(384), 1024)
    pixel = torch.sqrt(-2 * torch.log(rows + 1e-7)) * torch.cos(6.2831853 * rest)
    return {**{k: v.contiguous() for k, v in tiles.items()}, "pixel": pixel.flatten()}


def _window(name: str, u: Tensor, v: Tensor) -> Tensor:
    """The [n, S, S] windows of a tile whose corners are (u, v) [n] in [0, 1)."""
    tile = noise_tiles()[name]
    windows = tile.unfold(0, IMAGE_SIZE, 1).unfold(1, IMAGE_SIZE, 1)
    return windows[(v * _TILE).long(), (u * _TILE).long()]


# --- backgrounds: (x, y) in pixels [S, S], u [n, 12] -> the mixture [n, S, S] of two colours ---


def _c(u: Tensor, k: int) -> Tensor:
    return u[:, k, None, None]


def _grass(x: Tensor, y: Tensor, u: Tensor) -> Tensor:
    return 0.5 + 0.28 * _window("blades", u[:, 0], u[:, 1])


def _sand(x: Tensor, y: Tensor, u: Tensor) -> Tensor:
    ripple = torch.sin(0.45 * y + 0.12 * x + 6.28 * _c(u, 2))
    return 0.5 + 0.16 * _window("fine", u[:, 0], u[:, 1]) + 0.12 * ripple


def _sky(x: Tensor, y: Tensor, u: Tensor) -> Tensor:
    clouds = (_window("soft", u[:, 0], u[:, 1]) - 0.5).clamp(0, 1)
    return (0.25 * y / IMAGE_SIZE + clouds).clamp(max=1)


def _water(x: Tensor, y: Tensor, u: Tensor) -> Tensor:
    bend = 1.4 * torch.sin(0.2 * x + 6.28 * _c(u, 2)) + _window("soft", u[:, 0], u[:, 1])
    return 0.5 + 0.4 * torch.sin(0.9 * y + bend + 6.28 * _c(u, 3))


def _snow(x: Tensor, y: Tensor, u: Tensor) -> Tensor:
    return 0.5 + 0.3 * _window("blobs", u[:, 0], u[:, 1])


def _brick(x: Tensor, y: Tensor, u: Tensor) -> Tensor:
    row = (y + 8 * _c(u, 2)) / 8
    column = (x + 14 * _c(u, 3)) / 14 + 0.5 * torch.floor(row).remainder(2)
    gap = torch.minimum(
        (row - torch.round(row)).abs() * 8, (column - torch.round(column)).abs() * 14
    )
    return (1.5 - gap).clamp(0, 1) + 0.06 * _window("fine", u[:, 0], u[:, 1])


def _wood(x: Tensor, y: Tensor, u: Tensor) -> Tensor:
    plank = (y + 13 * _c(u, 2)) / 13
    seam = (1.2 - (plank - torch.round(plank)).abs() * 13).clamp(0, 1)
    return 0.35 + 0.15 * _window("grain", u[:, 0], u[:, 1]) + 0.6 * seam


def _stone(x: Tensor, y: Tensor, u: Tensor) -> Tensor:
    field = _window("blobs", u[:, 0], u[:, 1])
    return 0.3 + 0.15 * field + 0.6 * (1 - field.abs() * 6).clamp(0, 1)  # cracks at its zeros


_Background = Callable[[Tensor, Tensor, Tensor], Tensor]
BACKGROUND: dict[str, tuple[_Background, tuple[float, ...], tuple[float, ...]]] = {
    "grass": (_grass, (0.16, 0.34, 0.10), (0.34, 0.52, 0.18)),
    "sand": (_sand, (0.66, 0.55, 0.38), (0.84, 0.74, 0.55)),
    "sky": (_sky, (0.42, 0.62, 0.84), (0.88, 0.92, 0.96)),
    "water": (_water, (0.06, 0.26, 0.42), (0.26, 0.52, 0.66)),
    "snow": (_snow, (0.70, 0.74, 0.82), (0.86, 0.88, 0.93)),
    "brick": (_brick, (0.50, 0.25, 0.20), (0.68, 0.62, 0.57)),
    "wood": (_wood, (0.48, 0.34, 0.22), (0.26, 0.17, 0.10)),
    "stone": (_stone, (0.52, 0.52, 0.50), (0.28, 0.28, 0.28)),
}

"""Shapes as signed distance functions and the patterns on them.

A distance function gives, for every pixel, the distance to the edge of a shape, negative inside;
clamping it gives an antialiased mask. Most formulas follow Inigo Quilez, "2D distance functions"
(iquilezles.org/articles/distfunctions2d); some are exact near the edge alone, which is all that a
mask needs.

Letters: n scenes that share a shape or a pattern, S pixels. Coordinates are in units of the
object's radius, x to the right and y down.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

# --- shapes: x, y [n, S, S] -> distance [n, S, S] in the same unit ---


def _circle(x: Tensor, y: Tensor) -> Tensor:
    return torch.hypot(x, y) - 0.92


def _square(x: Tensor, y: Tensor) -> Tensor:
    return torch.maximum(x.abs(), y.abs()) - 0.78


def _triangle(x: Tensor, y: Tensor) -> Tensor:
    # Equilateral, its centroid at the middle, its tip (towards -y, up) at distance 1.
    slope = 0.8660254 * x.abs() - 0.5 * y
    return torch.maximum(slope, y) - 0.5


def _star(x: Tensor, y: Tensor) -> Tensor:
    # Five-pointed: fold the plane into one tenth, then the distance to one straight edge.
    sector = 2 * math.pi / 5
    angle = torch.atan2(x, -y)
    angle = (angle - sector * torch.round(angle / sector)).abs()
    r = torch.hypot(x, y)
    px, py = r * torch.cos(angle), r * torch.sin(angle)
    # The edge from the tip (1, 0) to the notch at radius 0.42 and half a sector.
    ex, ey = 0.42 * math.cos(sector / 2) - 1, 0.42 * math.sin(sector / 2)
    length = math.hypot(ex, ey)
    return ((px - 1) * ey - py * ex) / length


def _cross(x: Tensor, y: Tensor) -> Tensor:
    ax, ay = x.abs(), y.abs()
    return torch.maximum(torch.maximum(ax, ay) - 0.95, torch.minimum(ax, ay) - 0.31)


def _ring(x: Tensor, y: Tensor) -> Tensor:
    return (torch.hypot(x, y) - 0.71).abs() - 0.25


def _heart(x: Tensor, y: Tensor) -> Tensor:
    # Two arcs and a point (Quilez, "heart"), its height 1.2 scaled to the unit disc.
    scale = 1.62
    ax, up = x.abs() / scale, 0.56 - y / scale
    arc = torch.hypot(ax - 0.25, up - 0.75) - 0.35355339
    tip = torch.hypot(ax, up - 1.0)
    t = 0.5 * (ax + up).clamp(min=0)
    side = torch.hypot(ax - t, up - t) * torch.sign(ax - up)
    inner = torch.minimum(tip, side.abs()) * torch.sign(ax - up)
    return torch.where(ax + up > 1.0, arc, inner) * scale


def _crescent(x: Tensor, y: Tensor) -> Tensor:
    outer = torch.hypot(x + 0.06, y) - 0.94
    bite = torch.hypot(x - 0.46, y) - 0.72
    return torch.maximum(outer, -bite)


SHAPE_DISTANCE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "star": _star,
    "cross": _cross,
    "ring": _ring,
    "heart": _heart,
    "crescent": _crescent,
}


# --- patterns: how much of the second colour, [n, S, S] in [0, 1]; `r` [n, 1, 1] is the radius
# in pixels, so that (value in units of the radius) * r is antialiased over one pixel ---


def _wave(t: Tensor, period: float) -> Tensor:
    """Signed distance to the stripes of a square wave: positive on every other half period."""
    t = t / period
    return (0.25 - (t - torch.floor(t) - 0.5).abs()) * period


def _striped(x: Tensor, y: Tensor, d: Tensor, r: Tensor) -> Tensor:
    return (0.5 + _wave(0.6 * x + 0.8 * y, 0.55) * r).clamp(0, 1)


def _dotted(x: Tensor, y: Tensor, d: Tensor, r: Tensor) -> Tensor:
    pitch = 0.56
    gx = (x / pitch - torch.round(x / pitch)) * pitch
    gy = (y / pitch - torch.round(y / pitch)) * pitch
    return (0.5 + (0.19 - torch.hypot(gx, gy)) * r).clamp(0, 1)


def _checkered(x: Tensor, y: Tensor, d: Tensor, r: Tensor) -> Tensor:
    a = (_wave(x, 0.9) * r).clamp(-0.5, 0.5)
    b = (_wave(y, 0.9) * r).clamp(-0.5, 0.5)
    return 0.5 + 2 * a * b


def _outlined(x: Tensor, y: Tensor, d: Tensor, r: Tensor) -> Tensor:
    return (0.5 + (d + 0.15) * r).clamp(0, 1)


# A plain object has no second colour.
PATTERN_MIX: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]] = {
    "striped": _striped,
    "dotted": _dotted,
    "checkered": _checkered,
    "outlined": _outlined,
}

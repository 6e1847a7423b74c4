"""What a scene can hold, and the random numbers that choose it.

A scene is one to three objects (shape, colour, pattern, size, position, rotation) on a
background, with light and noise. `Scenes` holds N of them as tensors; `sample_scenes` draws
them. Every number is a hash of (seed, stream, index, counter), so a scene does not depend on
the batch in which it is drawn, and no random number generator is touched.

Letters: N scenes, O = 3 object slots, S image side in pixels.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

IMAGE_SIZE = 64
SLOTS = 3
EMPTY = -1  # the label of an object slot that holds nothing

SHAPES = ("circle", "square", "triangle", "star", "cross", "ring", "heart", "crescent")
COLOURS = {  # sRGB in [0, 1]
    "red": (0.87, 0.10, 0.12),
    "orange": (0.98, 0.52, 0.05),
    "yellow": (0.98, 0.90, 0.12),
    "green": (0.10, 0.78, 0.22),
    "cyan": (0.15, 0.88, 0.92),
    "blue": (0.12, 0.22, 0.88),
    "purple": (0.52, 0.14, 0.68),
    "pink": (0.99, 0.56, 0.76),
    "white": (0.98, 0.98, 0.98),
    "black": (0.04, 0.04, 0.05),
}
PATTERNS = ("plain", "striped", "dotted", "checkered", "outlined")
BACKGROUNDS = ("grass", "sand", "sky", "water", "snow", "brick", "wood", "stone")
SIZES = ("small", "large")
POSITIONS = (  # row by row, as the nine cells are counted
    *("top left", "top", "top right"),
    *("left", "center", "right"),
    *("bottom left", "bottom", "bottom right"),
)
COUNTS = ("one", "two", "three")

# Radius in pixels by [count - 1][size]: scenes of several objects are scaled so that they fit.
RADIUS = ((11.0, 18.0), (10.0, 14.0), (9.0, 11.0))
_CELL = 11.0  # a single object stands in the middle of a cell of a 3 x 3 grid, in pixels apart
_CELL_EDGE = 5.5  # |offset from the middle| beyond which a position is no longer "center"

_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15, splitmix64's increment, as int64
_DRAWS = 64  # random numbers per scene


def _shift_right(z: Tensor, bits: int) -> Tensor:
    """Logical (not arithmetic) shift of int64."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def _mix(z: Tensor) -> Tensor:
    """splitmix64's finaliser (Steele, Lea, Flood 2014) on int64 with wrap-around."""
    z = (z ^ _shift_right(z, 30)) * -4658895280553007687  # 0xBF58476D1CE4E5B9
    z = (z ^ _shift_right(z, 27)) * -7723592293110705685  # 0x94D049BB133111EB
    return z ^ _shift_right(z, 31)


def uniforms(seed: int, stream: int, index: Tensor, n: int) -> Tensor:
    """Counter-based uniform numbers: a pure function of (seed, stream, index, 0..n-1).

    Args:
        index: [N] int64.
    Returns:
        [N, n] float32 in [0, 1), multiples of 2^-24.
    """
    key = _mix(torch.tensor(seed, dtype=torch.int64) * _GOLDEN + 1)
    key = _mix(key + torch.tensor(stream, dtype=torch.int64) * _GOLDEN)
    key = _mix(key + index.to(torch.int64) * _GOLDEN)  # [N]
    counter = torch.arange(1, n + 1, dtype=torch.int64) * _GOLDEN
    return _shift_right(_mix(key[:, None] + counter), 40).to(torch.float32) * 2.0**-24


@dataclass(frozen=True)
class Scenes:
    """N scenes; labels index the tuples above, `EMPTY` (-1) where a slot holds nothing."""

    count: Tensor  # [N] int64, 1..3
    background: Tensor  # [N] int64
    shape: Tensor  # [N, O] int64
    colour: Tensor  # [N, O] int64
    pattern: Tensor  # [N, O] int64
    size: Tensor  # [N, O] int64
    position: Tensor  # [N, O] int64, the cell of `POSITIONS`
    x: Tensor  # [N, O] float32, pixels from the left edge
    y: Tensor  # [N, O] float32, pixels from the top edge
    radius: Tensor  # [N, O] float32, pixels
    angle: Tensor  # [N, O] float32, radians
    phase: Tensor  # [N, O, 2] float32 in [0, 1), where the pattern begins
    look: Tensor  # [N, 12] float32 in [0, 1): light, noise and the background's own choices

    def __len__(self) -> int:
        return len(self.count)

    def __getitem__(self, index: Tensor | slice) -> Scenes:
        return Scenes(*(getattr(self, f.name)[index] for f in fields(self)))


@dataclass(frozen=True)
class Distribution:
    """How often what is drawn; everything else is uniform."""

    counts: tuple[float, float, float] = (0.6, 0.2, 0.2)  # probability of 1, 2, 3 objects
    large: float = 0.5  # probability that an object is large


SINGLE = Distribution(counts=(1.0, 0.0, 0.0))
MIXED = Distribution()


def sample_scenes(
    seed: int,
    stream: int,
    index: Tensor,
    distribution: Distribution = MIXED,
    fixed: dict[str, Tensor] | None = None,
) -> Scenes:
    """Draw the scenes number `index` of a stream.

    Args:
        index: [N] int64, any numbers in any order.
        fixed: labels [N] that are given rather than drawn. `shape`, `colour`, `pattern`, `size`
            and `position` are those of the first object; `count` is 1..3.
    Returns:
        N scenes. Objects never overlap, and none leaves the image by more than a pixel. In scenes
        of one object, size and position are independent.
    """
    fixed = fixed or {}
    n = len(index)
    u = uniforms(seed, stream, index, _DRAWS)
    column = iter(u.unbind(1))

    def draw(k: int) -> Tensor:  # [N, k]
        return torch.stack([next(column) for _ in range(k)], 1)

    def labels(name: str, values: Tensor) -> Tensor:
        if name in fixed:
            values[:, 0] = fixed[name]
        return values

    one, two, _ = distribution.counts
    c = draw(1)[:, 0]
    count = fixed.get("count", 1 + (c >= one).long() + (c >= one + two).long())
    background = fixed.get("background", (draw(1)[:, 0] * len(BACKGROUNDS)).long())
    shape = labels("shape", (draw(SLOTS) * len(SHAPES)).long())
    colour = labels("colour", (draw(SLOTS) * len(COLOURS)).long())
    pattern = labels("pattern", (draw(SLOTS) * len(PATTERNS)).long())
    size = labels("size", (draw(SLOTS) < distribution.large).long())
    cell = fixed.get("position", (draw(1)[:, 0] * len(POSITIONS)).long())

    table = torch.tensor(RADIUS)
    radius = table[(count - 1)[:, None].expand(n, SLOTS), size] * (0.94 + 0.1 * draw(SLOTS))
    angle = (draw(SLOTS) - 0.5) * (40 * torch.pi / 180)

    # One object: the middle of its cell. Two or three: on a circle round the image's middle.
    jitter_x, jitter_y = draw(SLOTS) * 2 - 1, draw(SLOTS) * 2 - 1
    turn = draw(1) + torch.arange(SLOTS) / count[:, None]  # [N, O], in whole turns
    orbit = torch.where(count == 2, 15.5, 18.5)[:, None]
    dx = orbit * torch.cos(2 * torch.pi * turn) + 1.2 * jitter_x
    dy = orbit * torch.sin(2 * torch.pi * turn) + 1.2 * jitter_y
    single = (count == 1)[:, None]
    # 64 - 2 * 18.72 leaves 13.2 pixels either side of the middle, whatever the size.
    dx = torch.where(single, ((cell % 3 - 1) * _CELL)[:, None] + 2.2 * jitter_x, dx)
    dy = torch.where(single, ((cell // 3 - 1) * _CELL)[:, None] + 2.2 * jitter_y, dy)

    def third(d: Tensor) -> Tensor:
        return 1 + (d > _CELL_EDGE).long() - (d < -_CELL_EDGE).long()

    empty = torch.arange(SLOTS) >= count[:, None]
    middle = IMAGE_SIZE / 2
    return Scenes(
        count=count,
        background=background,
        shape=shape.masked_fill(empty, EMPTY),
        colour=colour.masked_fill(empty, EMPTY),
        pattern=pattern.masked_fill(empty, EMPTY),
        size=size.masked_fill(empty, EMPTY),
        position=(3 * third(dy) + third(dx)).masked_fill(empty, EMPTY),
        x=middle + dx,
        y=middle + dy,
        radius=radius,
        angle=angle,
        phase=torch.stack((draw(SLOTS), draw(SLOTS)), -1),
        look=draw(12),
    )

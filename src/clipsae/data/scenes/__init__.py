"""A built-in world of rendered scenes whose ground truth is known, patch by patch."""

from clipsae.data.scenes.dataset import ScenesDataset
from clipsae.data.scenes.grammar import KINDS, Kind, Template
from clipsae.data.scenes.world import (
    BACKGROUNDS,
    COLOURS,
    COUNTS,
    PATTERNS,
    POSITIONS,
    SHAPES,
    SIZES,
    Scenes,
)

__all__ = [
    "BACKGROUNDS",
    "COLOURS",
    "COUNTS",
    "KINDS",
    "PATTERNS",
    "POSITIONS",
    "SHAPES",
    "SIZES",
    "Kind",
    "Scenes",
    "ScenesDataset",
    "Template",
]

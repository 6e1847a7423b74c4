"""`ScenesDataset`: rendered scenes as an image classification dataset.

Nothing is stored: image i is drawn when asked for, from a hash of (seed, kind, split, i).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import interpolate
from torch.utils.data import Dataset

from clipsae.data.dataset import check_choice
from clipsae.data.scenes.grammar import KINDS, Kind, Template, make_captions
from clipsae.data.scenes.renderer import patch_coverage, render
from clipsae.data.scenes.world import (
    BACKGROUNDS,
    COLOURS,
    EMPTY,
    IMAGE_SIZE,
    MIXED,
    PATTERNS,
    SHAPES,
    SINGLE,
    SIZES,
    Distribution,
    Scenes,
    sample_scenes,
    uniforms,
)

SPLITS = ("train", "test")
ALL = "all"  # every kind of scene together; its label is the count
SPURIOUS = "spurious"  # two shapes, each tied to a background
SPURIOUS_SHAPES, SPURIOUS_BACKGROUNDS = ("circle", "square"), ("grass", "water")
TIED = {"train": 0.95, "test": 0.5}  # share of the images in which a shape is on its own background
FAR = 0.75  # radius of their objects, as a share of a small one's
_KIND_NAMES = (*KINDS, ALL, SPURIOUS)
_TIES = 0x71E5  # the random stream of what background a shape is on
_VERSION = 1  # of what the images look like: results of another version are other results
_DEFAULT_SIZE = {"train": 32768, "test": 2048}
_EQUAL_COUNTS = Distribution(counts=(1 / 3, 1 / 3, 1 / 3))


class ScenesDataset(Dataset):
    """Scenes of one kind, with balanced labels: image i has label i modulo the class count.

    Args:
        kind: what the label is: shape, colour, pattern, background, shape_colour, count, size,
            position, or `all` (one to three objects, everything at random, labelled by count:
            what SAEs are trained on), or `spurious`: a small circle or square, the one on grass and
            the other on water in `TIED` of the images. Kinds whose label is ambiguous with several
            objects show one object.
        split: train or test. Splits and kinds are separate random streams.
        size: number of images, of each split ({"train": 4000, "test": 2000}) or of either.
        seed: another seed, other images.
        name: how results name the dataset; `scenes_<kind>` if not given.
        image_size: side in pixels. Scenes are drawn at 64, and enlarged for a CLIP that sees more
            (bicubic, as CLIP's own preprocessing does).

    Attributes:
        groups, groupnames, confounder: of the kind `spurious` alone, as of
            `clipsae.data.published.groups.GroupedDataset`.
    """

    def __init__(
        self,
        kind: str = ALL,
        split: str = "train",
        size: int | Mapping[str, int] | None = None,
        seed: int = 0,
        name: str | None = None,
        image_size: int = IMAGE_SIZE,
    ) -> None:
        if kind not in _KIND_NAMES:
            raise ValueError(f"unknown kind of scenes {kind!r}: expected {', '.join(_KIND_NAMES)}")
        check_choice("split", split, *SPLITS)
        if image_size < 1:
            raise ValueError(f"image_size must be at least 1, got {image_size}")
        size = _DEFAULT_SIZE if size is None else size
        length = size if isinstance(size, int) else size[split]
        if length < 0:
            raise ValueError(f"size must not be negative, got {length}")
        self.kind, self.split, self.seed = kind, split, seed
        self.name = name or ("scenes" if kind == ALL else f"scenes_{kind}")
        self.image_size = image_size
        described: Kind = KINDS[{ALL: "count", SPURIOUS: "shape"}.get(kind, kind)]
        if kind == SPURIOUS:
            described = replace(described, classnames=SPURIOUS_SHAPES)
        self.classnames: list[str] = list(described.classnames)
        self.templates: tuple[Template, ...] = described.templates
        self.labels: Tensor = torch.arange(length) % len(self.classnames)  # [N]
        self._stream = 1 + _KIND_NAMES.index(kind) * len(SPLITS) + SPLITS.index(split)
        self._distribution = SINGLE if described.single else _EQUAL_COUNTS
        if kind == ALL:
            self._distribution = MIXED
            self.labels = self.scenes(torch.arange(length)).count - 1
        if kind == SPURIOUS:
            self.confounder = SPURIOUS_BACKGROUNDS
            self.groups = 2 * self.labels + self._on_background(torch.arange(length))
            self.groupnames = [f"{s} on {b}" for s in self.classnames for b in self.confounder]

    @property
    def concepts(self) -> dict[str, tuple[str, ...]]:
        """The attributes that a patch can have, with their values in the order of its labels."""
        values = {"shape": SHAPES, "colour": COLOURS, "pattern": PATTERNS, "size": SIZES}
        return {name: tuple(of) for name, of in {**values, "background": BACKGROUNDS}.items()}

    @property
    def fingerprint(self) -> str:
        """What decides the images, beside the renderer's version."""
        return f"scenes-{_VERSION}-{self.kind}-{self.split}-{len(self)}-{self.seed}"

    def __len__(self) -> int:
        return len(self.labels)

    def _index(self, indices: Sequence[int] | Tensor) -> Tensor:
        index = torch.as_tensor(indices, dtype=torch.int64)
        # A negative index counts from the end, as in a list.
        index = torch.where(index < 0, index + len(self.labels), index)
        if bool(((index < 0) | (index >= len(self.labels))).any()):
            raise IndexError(f"index out of range for {len(self)} images of {self.name}")
        return index

    def scenes(self, indices: Sequence[int] | Tensor) -> Scenes:
        """What the images show, before it is drawn."""
        index = self._index(indices)
        fixed: dict[str, Tensor] = {}
        if self.kind == SPURIOUS:
            return self._spurious_scenes(index)
        if self.kind == "shape_colour":
            label = self.labels[index]
            fixed = {"shape": label // len(COLOURS), "colour": label % len(COLOURS)}
        elif self.kind == "count":
            fixed = {"count": self.labels[index] + 1}
        elif self.kind != ALL:
            fixed = {self.kind: self.labels[index]}
        return sample_scenes(self.seed, self._stream, index, self._distribution, fixed)

    def _on_background(self, index: Tensor) -> Tensor:
        """Which of `SPURIOUS_BACKGROUNDS` images show, LongTensor [n]: mostly that of the label."""
        tied = uniforms(self.seed, _TIES + self._stream, index, 1)[:, 0] < TIED[self.split]
        label = self.labels[index]
        return torch.where(tied, label, 1 - label)

    def _spurious_scenes(self, index: Tensor) -> Scenes:
        shapes = torch.tensor([SHAPES.index(name) for name in SPURIOUS_SHAPES])
        backgrounds = torch.tensor([BACKGROUNDS.index(name) for name in SPURIOUS_BACKGROUNDS])
        fixed = {
            "shape": shapes[self.labels[index]],
            "background": backgrounds[self._on_background(index)],
            "size": torch.zeros_like(index),
        }
        scenes = sample_scenes(self.seed, self._stream, index, self._distribution, fixed)
        return replace(scenes, radius=scenes.radius * FAR)

    def images(self, indices: Sequence[int] | Tensor) -> tuple[Tensor, Tensor]:
        """Many images at once: [n, 3, S, S] uint8 and labels [n]; the fastest way."""
        index = torch.as_tensor(indices, dtype=torch.int64)
        images = render(self.scenes(index))[0]
        if self.image_size != IMAGE_SIZE:
            size = (self.image_size, self.image_size)
            images = interpolate(images, size, mode="bicubic", antialias=True)
        return images, self.labels[index]

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """Image [3, S, S] uint8 and its label."""
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[tuple[Tensor, int]]:
        """The same for many, drawn together; a DataLoader calls this with a whole batch."""
        images, labels = self.images(indices)
        return list(zip(images.unbind(), labels.tolist(), strict=True))

    def captions(self, indices: Sequence[int] | Tensor) -> list[str]:
        """A caption of each image, true of it: some of its attributes, chosen at random, in the
        words that the built-in CLIP was trained on."""
        drawn = self._index(indices) + (self._stream << 32)  # other words in each kind and split
        return make_captions(self.scenes(indices), self.seed, drawn).texts

    def attributes(self, indices: Sequence[int] | Tensor) -> dict[str, Tensor]:
        """Ground truth of images.

        Returns:
            `count` (1..3) and `background` [n]; `shape`, `colour`, `pattern`, `size`, `position`
            [n, 3], one column for each object slot, indices into the names in
            `clipsae.data.scenes`, -1 where the slot is empty; `x`, `y`, `radius` [n, 3] in pixels
            and `angle` in radians, NaN where it is empty.
        """
        s = self.scenes(indices)
        empty = s.shape == EMPTY
        names = ("count", "background", "shape", "colour", "pattern", "size", "position")
        truth = {n: getattr(s, n) for n in names}
        for n in ("x", "y", "radius", "angle"):
            truth[n] = getattr(s, n).masked_fill(empty, torch.nan)
        return truth

    def patch_truth(
        self, indices: Sequence[int] | Tensor, grid: int = 8, min_coverage: float = 0.25
    ) -> dict[str, Tensor]:
        """What is in each patch of a grid x grid, row by row as ViT counts them.

        Returns:
            `coverage` [n, grid^2]: how much of the patch its foremost object covers, 0..1;
            `object` [n, grid^2]: the slot of that object, -1 (background) where it covers less
            than `min_coverage`; `shape`, `colour`, `pattern`, `size` [n, grid^2]: its labels or -1.
        """
        s = self.scenes(indices)
        return patch_labels(s, patch_coverage(render(s)[1], grid), min_coverage)


def patch_labels(scenes: Scenes, coverage: Tensor, min_coverage: float) -> dict[str, Tensor]:
    """Per patch labels from per patch coverage [n, O, P]; see `ScenesDataset.patch_truth`."""
    most, slot = coverage.max(1)  # [n, P]
    background = most < min_coverage
    truth = {"coverage": most, "object": slot.masked_fill(background, EMPTY)}
    for name in ("shape", "colour", "pattern", "size"):
        truth[name] = getattr(scenes, name).gather(1, slot).masked_fill(background, EMPTY)
    return truth

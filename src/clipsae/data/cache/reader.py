"""A finished cache, read by position.

N images, n images of a shard or of a request.
"""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from clipsae.data.cache.files import Layout, TokenLayout, read_manifest

_ROWS = 64  # images that are read by one call to the system, at most


class Cache:
    """What is kept of N images, by their positions in the cache. Several threads may read.

    Files are read, not mapped: rows are read straight into the result, without another copy.

    Args:
        folder: with the manifest and the shards.
        kind: of what is kept.
        contents: what must be in the manifest's "of"; None: anything.

    Attributes:
        layout: sizes and order.
        images: the dataset's index of the image at each position, LongTensor [N]; a permutation.
        sources: the same, except where an image could not be read: the one in its place.

    Raises:
        ValueError: no cache, one of something else, or one that is not whole, in one sentence.
    """

    def __init__(
        self,
        folder: Path | str,
        contents: Mapping[str, Any] | None = None,
        *,
        kind: type[Layout] = TokenLayout,
    ) -> None:
        self.folder = Path(folder)
        self.layout, self.contents, sizes = read_manifest(self.folder, kind)
        for name, wanted in (contents or {}).items():
            if (found := self.contents.get(name)) != wanted:
                raise ValueError(
                    f"{self.folder} holds {self.layout.HOLDS} of {name}={found}, expected "
                    f"{wanted}: choose another folder for the {self.layout.NAME}, or remove it, "
                    "and it is recomputed"
                )
        self._files: list[BinaryIO] = []
        self._starts: list[int] = []  # of the first image in each file
        indices = [self._open(shard, size) for shard, size in enumerate(sizes)]
        self.images, self.sources = (torch.cat(parts) for parts in zip(*indices, strict=True))
        if not torch.equal(self.images.sort().values, torch.arange(self.layout.images)):
            raise ValueError(
                f"{self.folder} does not hold each of {self.layout.images} images once: remove it, "
                "and it is recomputed"
            )

    def __len__(self) -> int:
        """N."""
        return self.layout.images

    def read(self, positions: Tensor) -> Tensor:
        """Tokens [n, T, d] in the cache's dtype or images uint8 [n, 3, S, S], in the order of the
        positions [n].

        Raises:
            ValueError: a shard that has become shorter.
        """
        return self.read_parts([positions])[0]

    def read_parts(self, parts: Sequence[Tensor], *, pin_memory: bool = False) -> list[Tensor]:
        """The same for several lists of positions, each into memory of its own.

        All are read in the order in which they lie on disk, neighbours in one go.
        """
        size, dtype = self.layout.image_bytes, self.layout.numbers
        out = [
            torch.empty(len(part), *self.layout.shape, dtype=dtype, pin_memory=pin_memory)
            for part in parts
        ]
        rows = [row for part in out for row in part.view(torch.uint8).flatten(1).numpy()]
        in_order, places = torch.cat(list(parts)).sort()
        stretches = list(self._stretches(in_order))
        if hasattr(os, "posix_fadvise"):  # the system reads ahead: twice as fast from a cold disk
            for file, start, count in stretches:
                os.posix_fadvise(file.fileno(), start, count * size, os.POSIX_FADV_WILLNEED)
        into = (rows[place] for place in places.tolist())
        for file, start, count in stretches:
            if os.preadv(file.fileno(), list(islice(into, count)), start) < count * size:
                raise ValueError(
                    f"{file.name} ends within its images: run task=cache, and it is recomputed"
                )
        return out

    def _stretches(self, positions: Tensor) -> Iterator[tuple[BinaryIO, int, int]]:
        """Neighbours among sorted positions: their file, where they start in it, how many."""
        n = self.layout.shard_images
        ends = ((positions.diff() != 1) | (positions[1:] % n == 0)).nonzero().flatten() + 1
        for whole in positions.tensor_split(ends):
            for stretch in whole.split(_ROWS):
                if len(stretch):
                    shard, row = divmod(int(stretch[0]), n)
                    start = self._starts[shard] + row * self.layout.image_bytes
                    yield self._files[shard], start, len(stretch)

    def _open(self, shard: int, size: int) -> tuple[Tensor, Tensor]:
        """Open a shard's file and read its images and sources."""
        path = self.folder / self.layout.file(shard)
        try:
            file = path.open("rb", buffering=0)
        except FileNotFoundError as error:
            raise ValueError(f"{path} is missing: run task=cache, and it is recomputed") from error
        expected, n = self.layout.header(shard), self.layout.count(shard)
        header = file.read(8)
        header += file.read(int.from_bytes(header, "little") if len(header) == 8 else 0)
        there = path.stat().st_size
        if there != size or _fields(header) != _fields(expected):
            raise ValueError(
                f"{path} has {there} of {size} bytes, or another header than the manifest says: "
                "run task=cache, and it is recomputed"
            )
        self._files.append(file)
        self._starts.append(len(header))
        file.seek(len(header) + n * self.layout.image_bytes)
        both = torch.frombuffer(bytearray(file.read(16 * n)), dtype=torch.int64)
        return both[:n], both[n:]


class Caches:
    """Several caches of tokens of the same images in the same order, read together: one for each
    layer.

    Args:
        caches: at least one, by layer.

    Attributes: those of a `Cache`.

    Raises:
        ValueError: they hold other images, or in another order.
    """

    def __init__(self, caches: Mapping[int, Cache]) -> None:
        self.of = dict(caches)
        first = next(iter(self.of.values()))
        self.layout, self.images, self.sources = first.layout, first.images, first.sources
        for other in self.of.values():
            if not torch.equal(other.sources, first.sources):
                raise ValueError(
                    f"{first.folder} and {other.folder} hold other images, or in another order: "
                    "remove one, and it is recomputed"
                )

    def __len__(self) -> int:
        """N."""
        return len(self.images)

    def read_parts(
        self, parts: Sequence[Tensor], *, pin_memory: bool = False
    ) -> list[dict[int, Tensor]]:
        """`Cache.read_parts` of each, by layer."""
        found = [one.read_parts(parts, pin_memory=pin_memory) for one in self.of.values()]
        return [dict(zip(self.of, some, strict=True)) for some in zip(*found, strict=True)]


def _fields(header: bytes) -> Any:
    try:
        return json.loads(header[8:])
    except ValueError:
        return None

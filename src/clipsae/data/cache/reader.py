"""A finished feature cache, read by position.

N images, T tokens of an image, d width, n images of a shard or of a request.
"""

import json
import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from clipsae.data.cache.files import DTYPES, read_manifest


class TokenCache:
    """Tokens of N images, by their positions in the cache.

    Files are read, not mapped: rows are read straight into the result, without another copy.

    Args:
        folder: with the manifest and the shards.
        contents: what must be in the manifest's "of"; None: anything.

    Attributes:
        layout: sizes and order.
        images: the dataset's index of the image at each position, LongTensor [N]; a permutation.
        sources: the same, except where an image could not be read: the one in its place.

    Raises:
        ValueError: no cache, one of something else, or one that is not whole, in one sentence.
    """

    def __init__(self, folder: Path | str, contents: Mapping[str, Any] | None = None) -> None:
        self.folder = Path(folder)
        self.layout, self.contents, sizes = read_manifest(self.folder)
        for name, wanted in (contents or {}).items():
            if (found := self.contents.get(name)) != wanted:
                raise ValueError(
                    f"{self.folder} holds tokens of {name}={found}, expected {wanted}: choose "
                    "another features.cache.folder, or remove it, and it is recomputed"
                )
        self._lock = threading.Lock()  # files have one position each
        self._files: list[BinaryIO] = []
        self._starts: list[int] = []  # of the first token in each file
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

    def read(self, positions: Tensor, *, pin_memory: bool = False) -> Tensor:
        """Tokens [n, T, d] in the cache's dtype, in the order of the positions [n].

        Each stretch of consecutive positions is read in one go, in the order in which it lies on
        disk.

        Raises:
            ValueError: a shard that has become shorter.
        """
        layout = self.layout
        shape = (len(positions), layout.tokens, layout.width)
        out = torch.empty(shape, dtype=DTYPES[layout.dtype], pin_memory=pin_memory)
        rows = out.view(torch.uint8).flatten(1).numpy()
        sorted_positions, places = positions.sort()
        last = -2
        with self._lock:
            self._announce(sorted_positions)
            for position, place in zip(sorted_positions.tolist(), places.tolist(), strict=True):
                shard, row = divmod(position, layout.shard_images)
                file = self._files[shard]
                if position != last + 1 or row == 0:
                    file.seek(self._starts[shard] + row * layout.image_bytes)
                if file.readinto(rows[place]) != layout.image_bytes:
                    raise ValueError(
                        f"{file.name} ends within image {row}: run task=cache, and it is recomputed"
                    )
                last = position
        return out

    def _announce(self, positions: Tensor) -> None:
        """Announce the stretches that are about to be read, so that the system reads ahead: twice
        as fast from a cold disk."""
        if not hasattr(os, "posix_fadvise"):
            return
        n, size = self.layout.shard_images, self.layout.image_bytes
        ends = ((positions.diff() > 1) | (positions[1:] % n == 0)).nonzero().flatten() + 1
        for stretch in positions.tensor_split(ends):
            if len(stretch):
                shard, row = divmod(int(stretch[0]), n)
                file, start = self._files[shard], self._starts[shard] + row * size
                length = (int(stretch[-1]) - int(stretch[0]) + 1) * size
                os.posix_fadvise(file.fileno(), start, length, os.POSIX_FADV_WILLNEED)

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


def _fields(header: bytes) -> Any:
    try:
        return json.loads(header[8:])
    except ValueError:
        return None

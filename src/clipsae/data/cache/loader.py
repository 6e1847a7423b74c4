"""The training's stream of tokens from a feature cache: permuted blocks, permuted again within a
buffer, the next buffer read by a thread.

B images of a batch, N images of the cache, T tokens of an image, d width.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from typing import Any

import torch
from torch import Tensor

from clipsae.data.cache.reader import TokenCache
from clipsae.data.loader import Batch, Block, ResumableLoader, mix, permutation

Window = list[tuple[Tensor, int, int]]  # of each mixing block: positions, its seed, first part


def check_reading(block_images: int, buffer_images: int) -> None:
    """Refuse invalid sizes.

    Raises:
        ValueError: such sizes.
    """
    if block_images < 1:
        raise ValueError(f"block_images={block_images}: must be at least 1")
    if buffer_images < 0:
        raise ValueError(f"buffer_images={buffer_images}: must be at least 0")


class CachedLoader(ResumableLoader):
    """Batches of tokens, in the form in which `ResumableLoader` hands out images, with the same
    state, remainder (what does not fill a step of all ranks is left out: other images each epoch)
    and resumption.

    An epoch's order is a pure function of seed and epoch: the cache's blocks of consecutive images
    are permuted, each rank takes an equal stretch of them, and the images of each buffer are
    permuted. Blocks are numbered by their first image, so that blocks of one image without a
    buffer come in the order in which online training reads images.

    Args:
        cache: N images.
        batch_size: B, images a step and rank.
        block_images: images that are read in one go.
        buffer_images: images among which images are permuted, held in memory twice (the next are
            read meanwhile); rounded up to whole mixing blocks. 0: blocks are permuted alone.
        options: seed, shuffle_images, rank, world_size, pin_memory of `ResumableLoader`.

    Raises:
        ValueError: an invalid size.
    """

    def __init__(
        self,
        cache: TokenCache,
        batch_size: int,
        *,
        block_images: int = 64,
        buffer_images: int = 1024,
        **options: Any,
    ) -> None:
        check_reading(block_images, buffer_images)
        super().__init__(cache, batch_size, **options)
        self.cache = cache
        self.block_images = block_images
        self.buffer_images = buffer_images
        # Mixing blocks of a buffer.
        self.window = max(1, -(-buffer_images // (self.parts * batch_size)))

    def _options(self) -> dict[str, int]:
        reading = {"block_images": self.block_images, "buffer_images": self.buffer_images}
        return {**super()._options(), **reading}

    def order(self, epoch: int) -> Tensor:
        """The positions of an epoch by permuted blocks, LongTensor [N]."""
        size = self.block_images
        by_first_image = self.cache.images[::size].argsort(stable=True)
        blocks = by_first_image[permutation(len(by_first_image), self.seed, epoch)]
        positions = (blocks[:, None] * size + torch.arange(size)).flatten()
        return positions[positions < len(self.cache)]

    def blocks(self, epoch: int) -> list[tuple[Tensor, int]]:
        """This rank's mixing blocks of an epoch: positions, and a number that is the block's."""
        share, size = len(self) * self.batch_size, self.parts * self.batch_size
        mine = self.order(epoch)[self.rank * share : (self.rank + 1) * share]
        if self.buffer_images:
            buffers = mine.split(self.window * size)
            mine = torch.cat(
                [
                    buffer[permutation(len(buffer), self.seed, epoch, self.rank, i)]
                    for i, buffer in enumerate(buffers)
                ]
            )
        return [(b, i * self.world_size + self.rank) for i, b in enumerate(mine.split(size))]

    def _windows_from(self, epoch: int, position: int) -> Iterator[Window]:
        """What is read in one go, without end; after a resumption only what is left of it."""
        first, part = divmod(position, self.parts)
        for at in count(epoch):
            blocks = self.blocks(at)
            while first < len(blocks):
                end = (first // self.window + 1) * self.window
                window = [(b, mix(self.seed, at, number), 0) for b, number in blocks[first:end]]
                window[0] = (*window[0][:2], part)
                yield window
                first, part = end, 0
            first = 0

    def _read_from(self, epoch: int, position: int) -> Iterator[Batch]:
        """Batches without end."""
        windows = self._windows_from(epoch, position)
        with ThreadPoolExecutor(1, "feature-cache") as reader:
            window = next(windows)
            ahead = reader.submit(self._read, window)
            while True:
                blocks = ahead.result()
                following = next(windows)
                ahead = reader.submit(self._read, following)
                for (_, seed, first), tokens in zip(window, blocks, strict=True):
                    parts = len(tokens) // self.batch_size
                    for part in range(first, parts):
                        yield ([tokens] if part == first else None), Block(seed, part, parts)
                window = following

    def _read(self, window: Window) -> tuple[Tensor, ...]:
        """Tokens [n, T, d] of each mixing block."""
        positions = torch.cat([block for block, _, _ in window])
        tokens = self.cache.read(positions, pin_memory=self.pin_memory)
        return tokens.split([len(block) for block, _, _ in window])

"""The training's stream from a cache, what comes next read by a thread: decoded images in the order
of online training; tokens in permuted blocks, permuted again within a buffer.

B images of a batch, N images of the cache.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, groupby, islice
from typing import Any

import torch
from torch import Tensor

from clipsae.data.cache.reader import Cache, Caches
from clipsae.data.captions import with_texts
from clipsae.data.loader import Batch, Block, ResumableLoader, permutation


def check_reading(block_images: int, buffer_images: int) -> None:
    """Refuse invalid sizes.

    Raises:
        ValueError: such sizes.
    """
    if block_images < 1:
        raise ValueError(f"block_images={block_images}: must be at least 1")
    if buffer_images < 0:
        raise ValueError(f"buffer_images={buffer_images}: must be at least 0")


class CacheLoader(ResumableLoader):
    """Batches from a cache, read ahead by a thread: of decoded images those of `ResumableLoader`
    on their dataset.

    Args:
        cache: N images.
        batch_size: B, images a step and rank.
        buffer_images: images that are read in one go, held in memory twice (the next are read
            meanwhile); rounded up to whole mixing blocks. The more, the more requests a disk
            answers at a time.
        options: seed, shuffle_images, rank, world_size, pin_memory, transform, texts, prefetch of
            `ResumableLoader`.

    Raises:
        ValueError: an invalid size.
    """

    def __init__(
        self, cache: Cache | Caches, batch_size: int, *, buffer_images: int = 1024, **options: Any
    ) -> None:
        super().__init__(cache, batch_size, **options)
        self.cache = cache
        self.buffer_images = buffer_images
        # Mixing blocks of a buffer.
        self.window = max(1, -(-buffer_images // (self.parts * batch_size)))

    def _read(self, epoch: int, position: int) -> Iterator[tuple[Block, list[Batch]]]:
        """A thread reads the next buffer, after a resumption what is left of it."""
        blocks = self._blocks_from(epoch, position)
        by_buffer = groupby(blocks, lambda block: (block.epoch, block.number // self.window))
        buffers = (list(group) for _, group in by_buffer)
        with ThreadPoolExecutor(1, "cache") as reader:
            ahead = reader.submit(self._read_buffer, next(buffers))
            for following in buffers:
                found = ahead.result()
                ahead = reader.submit(self._read_buffer, following)
                yield from found

    def _read_buffer(self, blocks: list[Block]) -> list[tuple[Block, list[Batch]]]:
        """Each mixing block with what is kept of its images, batch by batch: large pieces of memory
        would go back to the system and be got anew each time."""
        batches = [block.indices.split(self.batch_size) for block in blocks]
        found = iter(self.read_parts(list(chain(*batches))))
        return [
            (block, list(islice(found, len(parts))))
            for block, parts in zip(blocks, batches, strict=True)
        ]

    def read_parts(self, parts: Sequence[Tensor]) -> list[Batch]:
        """What is kept of the images at several lists of positions, with their texts."""
        found = self.cache.read_parts(parts, pin_memory=self.pin_memory)
        if self.texts is None:
            return found
        sources = (self.cache.sources[part] for part in parts)
        return [with_texts(*both, self.texts) for both in zip(found, sources, strict=True)]


class TokenLoader(CacheLoader):
    """Batches of tokens with the state, remainder (what does not fill a step of all ranks is left
    out: other images each epoch) and resumption of `ResumableLoader`.

    An epoch's order is a pure function of seed and epoch: the cache's blocks of consecutive images
    are permuted, each rank takes an equal stretch of them, and the images of each buffer are
    permuted. Blocks are numbered by their first image, so that blocks of one image without a
    buffer come in the order in which online training reads images.

    Args:
        block_images: images that lie together on disk, and are read in one go.
        buffer_images: also the images among which images are permuted; 0: blocks are permuted
            alone.
        others: see `CacheLoader`.

    Raises:
        ValueError: an invalid size.
    """

    def __init__(
        self,
        cache: Cache | Caches,
        batch_size: int,
        *,
        block_images: int = 64,
        buffer_images: int = 1024,
        **options: Any,
    ) -> None:
        check_reading(block_images, buffer_images)
        super().__init__(cache, batch_size, buffer_images=buffer_images, **options)
        self.block_images = block_images

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

    def indices(self, epoch: int) -> Tensor:
        """This rank's positions of an epoch: a stretch of the order, permuted within buffers."""
        share = len(self) * self.batch_size
        stretch = self.order(epoch)[self.rank * share : (self.rank + 1) * share]
        if not self.buffer_images:
            return stretch
        buffers = stretch.split(self.window * self.parts * self.batch_size)
        return torch.cat(
            [
                buffer[permutation(len(buffer), self.seed, epoch, self.rank, i)]
                for i, buffer in enumerate(buffers)
            ]
        )

"""Streams of images whose order is a pure function of seed and epoch, and which can be resumed.

B images of a batch, S image side, N images of the dataset.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

import torch
from torch import Tensor

from clipsae.data.captions import Texts, with_texts
from clipsae.data.dataset import ImageDataset
from clipsae.data.reader import BadImages, read_batches

# What belongs to n images: [n, ...], or several such by name.
Batch = Tensor | Mapping[Any, "Batch"]
# (images of a block, several uint8 [B, 3, S, S], or those and their texts; the seed of its mix) ->
# what batches are cut from.
Transform = Callable[[list[Batch], int], Batch]
# Batches without end -> the same, each begun while the one before is in use.
Prefetch = Callable[[Iterator[Batch]], Iterator[Batch]]


@dataclass(frozen=True)
class Block:
    """Images whose tokens are mixed: of its epoch the `number`-th block on this rank, whose batches
    are handed out from `part` on."""

    epoch: int
    number: int
    indices: Tensor
    part: int


class ResumableLoader:
    """Batches of training images or their tokens, endlessly different by epoch, sharded over ranks.

    Lightning saves its state with a checkpoint. The position counts the batches that were handed
    out, not those that were read ahead. Workers read on into the next epoch, so that no
    epoch begins with a pause.

    Args:
        dataset: N images.
        batch_size: B, images a step and rank.
        seed: with the epoch, it decides the order.
        shuffle_images: images of a block, a multiple of B; 0: B.
        transform: what makes tokens of a block's images and mixes them; None: batches are images. A
            block that a resumption begins within is read and transformed again.
        rank, world_size: this process among all: rank r reads blocks r, r + world_size, ...
        num_workers: processes that read images; 0: this one. No influence on the order.
        pin_memory: for faster copies to a GPU.
        texts: of the images; None: they are read without captions.
        prefetch: such as `prefetched`; None: each batch is made when it is asked for.

    Raises:
        ValueError: an invalid size, or fewer images than one batch of all ranks.
    """

    def __init__(
        self,
        dataset: ImageDataset,
        batch_size: int,
        *,
        seed: int = 0,
        shuffle_images: int = 0,
        rank: int = 0,
        world_size: int = 1,
        num_workers: int = 0,
        pin_memory: bool = False,
        transform: Transform | None = None,
        texts: Texts | None = None,
        prefetch: Prefetch | None = None,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size}: must be at least 1")
        if shuffle_images < 0 or shuffle_images % batch_size:
            raise ValueError(
                f"shuffle_buffer_images={shuffle_images}: expected 0 or a multiple of "
                f"batch_size={batch_size}"
            )
        if num_workers < 0:
            raise ValueError(f"num_workers={num_workers}: must be at least 0")
        if len(dataset) < batch_size * world_size:
            raise ValueError(
                f"the training set has {len(dataset)} images, fewer than one step's "
                f"{batch_size * world_size}: choose a smaller features.batch_size"
            )
        self.dataset = dataset
        self.batch_size = batch_size
        self.seed = seed
        self.parts = max(1, shuffle_images // batch_size)
        self.rank, self.world_size = rank, world_size
        self.num_workers = num_workers
        self.pin_memory = pin_memory
        self.transform = transform or (lambda images, seed: joined(images))
        self.texts = texts
        self.prefetch = prefetch or (lambda batches: batches)
        self.epoch = 0
        self.position = 0
        self._resumed = False  # within an epoch that is yet to be continued
        self._stream: Iterator[Batch] | None = None
        self._stream_at = (0, 0)  # epoch and position of what the stream brings next
        self._bad = BadImages(dataset, "replaced by the next in the training", replaced=True)

    def __len__(self) -> int:
        """Batches of an epoch on this rank; a remainder that does not fill one is left out."""
        return len(self.dataset) // (self.batch_size * self.world_size)

    def state_dict(self) -> dict[str, int]:
        """Where the stream stands, and what it is a stream of."""
        return {"epoch": self.epoch, "position": self.position, **self._options()}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on where another loader with the same options was.

        Raises:
            ValueError: its options were others, so that its position means nothing here.
        """
        for name, mine in self._options().items():
            if state.get(name) != mine:
                raise ValueError(
                    f"the checkpoint's stream of images has {name}={state.get(name)}, this one "
                    f"{name}={mine}: continue with the former, or start a new training"
                )
        self.epoch, self.position = state["epoch"], state["position"]
        self._resumed = True
        if self.position >= len(self):
            self.epoch, self.position = self.epoch + 1, 0

    def _options(self) -> dict[str, int]:
        return {
            "images": len(self.dataset),
            "batch_size": self.batch_size,
            "shuffle_buffer_images": self.parts * self.batch_size if self.parts > 1 else 0,
            "seed": self.seed,
            "world_size": self.world_size,
        }

    def __iter__(self) -> Iterator[Batch]:
        # Here and not after the last batch: Lightning stops asking when `len` are handed out. It
        # also makes iterators that it does not use: an epoch of which nothing was handed out has
        # not been.
        if not self._resumed and self.position > 0:
            self.epoch, self.position = self.epoch + 1, 0
        return self._rest_of_epoch()

    def close(self) -> None:
        """Stop the workers, and report images that could not be read."""
        self._stream = None
        self._bad.report()

    def order(self, epoch: int) -> Tensor:
        """The permutation of the images in an epoch, LongTensor [N]."""
        return permutation(len(self.dataset), self.seed, epoch)

    def indices(self, epoch: int) -> Tensor:
        """This rank's images of an epoch: blocks r, r + world_size, ... of the order. What does not
        fill a block on every rank is dealt out as shorter ones."""
        order = self.order(epoch)[: len(self) * self.batch_size * self.world_size]
        size = self.parts * self.batch_size
        whole = len(order) // (size * self.world_size) * size * self.world_size
        blocks = order[:whole].view(-1, self.world_size, size)[:, self.rank]
        rest = order[whole:].view(self.world_size, -1)[self.rank]
        return torch.cat([blocks.flatten(), rest])

    def _rest_of_epoch(self) -> Iterator[Batch]:
        while self.position < len(self):
            at = self.epoch, self.position
            if self._stream is None or self._stream_at != at:
                self._stream = self.prefetch(self._read_from(*at))
            batch = next(self._stream)
            self.position += 1
            self._resumed = False
            last = self.position == len(self)
            self._stream_at = (self.epoch + 1, 0) if last else (self.epoch, self.position)
            if last:  # now, as Lightning does not ask again after it
                self._bad.report()
            yield batch

    def _blocks_from(self, epoch: int, position: int) -> Iterator[Block]:
        """Blocks without end."""
        first, part = divmod(position, self.parts)
        for at in count(epoch):
            blocks = self.indices(at).split(self.parts * self.batch_size)
            for number in range(first, len(blocks)):
                yield Block(at, number, blocks[number], part)
                part = 0
            first = 0

    def _read_from(self, epoch: int, position: int) -> Iterator[Batch]:
        """Batches without end."""
        for block, images in self._read(epoch, position):
            number = block.number * self.world_size + self.rank
            yield from self._batches(block, images, mix(self.seed, block.epoch, number))

    def _batches(self, block: Block, images: list[Batch], seed: int) -> Iterator[Batch]:
        """A generator of its own, or two blocks would be held at once."""
        yield from split(self.transform(images, seed), self.batch_size)[block.part :]

    def _read(self, epoch: int, position: int) -> Iterator[tuple[Block, list[Batch]]]:
        """Blocks without end, with their images."""
        wanted = (
            chunk.tolist()
            for block in self._blocks_from(epoch, position)
            for chunk in block.indices.split(self.batch_size)
        )
        batches = read_batches(
            self.dataset,
            wanted,
            num_workers=self.num_workers,
            pin_memory=self.pin_memory,
            replace=True,
            ahead=self.parts,  # the next block is read while this one is trained on
        )
        reader = (
            with_texts(images, indices, self.texts)
            for images, _, indices in self._bad.checked(batches)
        )
        for block in self._blocks_from(epoch, position):
            yield block, [next(reader) for _ in range(len(block.indices) // self.batch_size)]


def image_batches(
    dataset: ImageDataset,
    batch_size: int,
    num_workers: int = 0,
    indices: Sequence[int] | None = None,
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Images in a given order, the last batch as short as it comes.

    Args:
        dataset: N images.
        batch_size: B.
        num_workers: processes that read images; 0: this one.
        indices: which images, in which order; None: all.

    Yields:
        (images uint8 [B, 3, S, S], labels [B], indices [B]). With the dataset's
        `on_bad_image: skip` what cannot be read is left out, and reported at the end.

    Raises:
        BadImageError: a file that cannot be read, with `on_bad_image: error`.
    """
    wanted = torch.as_tensor(range(len(dataset)) if indices is None else indices).long()
    batches = [batch.tolist() for batch in wanted.split(batch_size)] if len(wanted) else []
    bad = BadImages(dataset, "left out")
    yield from bad.checked(
        read_batches(dataset, batches, num_workers=min(num_workers, len(batches)))
    )
    bad.report()


def joined(parts: Sequence[Any]) -> Any:
    """Tensors one after another; a single part is not copied."""
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def split(batch: Batch, size: int) -> Sequence[Batch]:
    """What belongs to n images -> to each `size` of them, one after another."""
    if isinstance(batch, Tensor):
        return batch.split(size)
    parts = [split(part, size) for part in batch.values()]
    return [dict(zip(batch, some, strict=True)) for some in zip(*parts, strict=True)]


def tensors(batch: Batch) -> Iterator[Tensor]:
    """All that a batch is of."""
    if isinstance(batch, Tensor):
        yield batch
    else:
        for part in batch.values():
            yield from tensors(part)


def permutation(n: int, *numbers: int) -> Tensor:
    """A permutation of n that is a pure function of several numbers, LongTensor [n]."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(mix(*numbers)))


def mix(*numbers: int) -> int:
    """A seed of 63 bits from several numbers, each of which matters."""
    mixed = 0x9E3779B97F4A7C15
    for number in numbers:
        mixed = (mixed ^ (number + 1)) * 0xBF58476D1CE4E5B9 % 2**64
        mixed ^= mixed >> 31
    return mixed >> 1

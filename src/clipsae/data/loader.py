"""Streams of images whose order is a pure function of seed and epoch, and which can be resumed.

B images of a batch, S image side, N images of the dataset.
"""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from clipsae.data.dataset import ImageDataset
from clipsae.data.images import BadImageError

log = logging.getLogger(__name__)

_PREFETCH = 4  # batches that each worker holds ready


@dataclass(frozen=True)
class Block:
    """Where a training batch stands in a block of images whose tokens are mixed.

    Attributes:
        seed: of the block's permutation.
        part, parts: this batch is that part of the block.
    """

    seed: int
    part: int
    parts: int


class ResumableLoader:
    """Batches of training images, endlessly different by epoch, sharded over ranks.

    Lightning saves its state with a checkpoint. The position counts the batches that were handed
    out, not those that workers have read ahead.

    Args:
        dataset: N images.
        batch_size: B, images a step and rank.
        seed: with the epoch, it decides the order.
        shuffle_images: images of a block within which tokens will be mixed; 0 for none. A
            multiple of B. A block's images come with its first batch (the first after a
            resumption, too), the block's other batches bring none.
        rank, world_size: this process among all: rank r reads blocks r, r + world_size, ...
        num_workers: processes that read images; 0: this one. No influence on the order.
        pin_memory: for faster copies to a GPU.

    Raises:
        ValueError: a size that cannot be, or fewer images than one batch of all ranks.
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
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size}: expected 1 or more")
        if shuffle_images < 0 or shuffle_images % batch_size:
            raise ValueError(
                f"shuffle_tokens={shuffle_images}: expected 0 or a multiple of "
                f"batch_size={batch_size}"
            )
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
        self.epoch = 0
        self.position = 0
        self._resumed = False  # within an epoch that is yet to be continued

    def __len__(self) -> int:
        """Batches of an epoch on this rank; a remainder that does not fill one is left out."""
        return len(self.dataset) // (self.batch_size * self.world_size)

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.epoch, self.position = state["epoch"], state["position"]
        self._resumed = True
        if self.position >= len(self):
            self.epoch, self.position = self.epoch + 1, 0

    def __iter__(self) -> Iterator[tuple[Tensor | None, Block]]:
        # Here and not after the last batch: Lightning stops asking when `len` are handed out. It
        # also makes iterators that it does not use: an epoch of which nothing was handed out has
        # not been.
        if not self._resumed and self.position > 0:
            self.epoch, self.position = self.epoch + 1, 0
        return self._batches()

    def order(self, epoch: int) -> Tensor:
        """The permutation of the images in an epoch, LongTensor [N]."""
        generator = torch.Generator().manual_seed(_mix(self.seed, epoch))
        return torch.randperm(len(self.dataset), generator=generator)

    def blocks(self, epoch: int) -> list[tuple[list[int], int]]:
        """This rank's blocks of an epoch: image indices, and a number that is the block's own."""
        order = self.order(epoch)
        size = self.parts * self.batch_size
        usable = len(self) * self.world_size * self.batch_size
        whole = usable // (size * self.world_size) * self.world_size
        found = [
            (order[b * size : (b + 1) * size].tolist(), b)
            for b in range(self.rank, whole, self.world_size)
        ]
        # What does not fill a block on every rank is dealt out as shorter ones.
        rest = (usable - whole * size) // self.world_size
        if rest:
            start = whole * size + self.rank * rest
            found.append((order[start : start + rest].tolist(), whole + self.rank))
        return found

    def _batches(self) -> Iterator[tuple[Tensor | None, Block]]:
        first, part = divmod(self.position, self.parts)
        blocks = self.blocks(self.epoch)[first:]
        reader = _reader(self.dataset, [b for b, _ in blocks], self.num_workers, self.pin_memory)
        bad = _BadImages(self.dataset, replaced=True)
        for (indices, number), (images, _, _, errors) in zip(blocks, reader, strict=True):
            bad.add(errors)
            if images is None:
                raise BadImageError("the training set has no image that can be read")
            parts = len(indices) // self.batch_size
            seed = _mix(self.seed, self.epoch, number)
            for here in range(part, parts):
                self.position += 1
                self._resumed = False
                yield (images if here == part else None), Block(seed, here, parts)
            part = 0
        bad.report()


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
    indices = list(range(len(dataset)) if indices is None else indices)
    batches = [indices[i : i + batch_size] for i in range(0, len(indices), batch_size)]
    bad = _BadImages(dataset, replaced=False)
    for images, labels, found, errors in _reader(dataset, batches, num_workers, False, keep=False):
        bad.add(errors)
        if len(found):
            yield images, labels, found
    bad.report()


def _mix(*numbers: int) -> int:
    """A seed of 63 bits from several numbers, each of which matters."""
    mixed = 0x9E3779B97F4A7C15
    for number in numbers:
        mixed = (mixed ^ (number + 1)) * 0xBF58476D1CE4E5B9 % 2**64
        mixed ^= mixed >> 31
    return mixed >> 1


def _reader(
    dataset: ImageDataset,
    batches: list[list[int]],
    num_workers: int,
    pin_memory: bool,
    keep: bool = True,
) -> DataLoader:
    return DataLoader(
        _Indexed(dataset, replace=keep),
        batch_sampler=batches,
        num_workers=min(num_workers, len(batches)),
        prefetch_factor=_PREFETCH if min(num_workers, len(batches)) else None,
        collate_fn=_collate,
        pin_memory=pin_memory,
        # Its own generator: the default draws from torch's global one, on which a resumed run
        # and an undisturbed one would then differ.
        generator=torch.Generator().manual_seed(0),
    )


@dataclass(frozen=True)
class _Item:
    image: Tensor | None
    label: int
    index: int
    error: str | None = None


class _Indexed(Dataset):
    """Items with their indices; a bad image is an item with an error, which outlives a worker
    process better than an exception."""

    def __init__(self, dataset: ImageDataset, replace: bool) -> None:
        self.dataset = dataset
        self.replace = replace and getattr(dataset, "on_bad_image", "error") == "skip"

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitems__(self, indices: list[int]) -> list[_Item]:
        if hasattr(self.dataset, "__getitems__"):
            found = self.dataset.__getitems__(indices)
            return [_Item(image, y, i) for (image, y), i in zip(found, indices, strict=True)]
        return [item for index in indices for item in self._read(index)]

    def _read(self, index: int) -> list[_Item]:
        """The item; with `replace`, bad ones are followed by the next good one of the list."""
        items: list[_Item] = []
        for offset in range(len(self.dataset)):
            at = (index + offset) % len(self.dataset)
            try:
                image, label = self.dataset[at]
            except BadImageError as error:
                items.append(_Item(None, -1, at, str(error)))
                if not self.replace:
                    break
            else:
                items.append(_Item(image, int(label), at))
                break
        return items


def _collate(items: list[_Item]) -> tuple[Tensor | None, Tensor, Tensor, list[str]]:
    good = [item for item in items if item.image is not None]
    return (
        torch.stack([item.image for item in good]) if good else None,
        torch.tensor([item.label for item in good], dtype=torch.long),
        torch.tensor([item.index for item in good], dtype=torch.long),
        [item.error for item in items if item.error is not None],
    )


class _BadImages:
    """Stops at the first unreadable file, or counts them, as the dataset says."""

    def __init__(self, dataset: Any, replaced: bool) -> None:
        self.skip = getattr(dataset, "on_bad_image", "error") == "skip"
        self.replaced = replaced
        self.errors: dict[str, None] = {}

    def add(self, errors: list[str]) -> None:
        if errors and not self.skip:
            raise BadImageError(f"{errors[0]}; on_bad_image=skip goes on without such files")
        self.errors.update(dict.fromkeys(errors))

    def report(self) -> None:
        if self.errors:
            log.warning(
                "%d images could not be read and were %s: %s%s",
                len(self.errors),
                "replaced by the next" if self.replaced else "left out",
                "; ".join(list(self.errors)[:3]),
                "; ..." if len(self.errors) > 3 else "",
            )

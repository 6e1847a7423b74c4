"""Reads batches of images in worker processes, and finds those that cannot be read, if possible
before a training.

B images of a batch, S image side, N images of the dataset.
"""

import logging
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from clipsae.data.dataset import ImageDataset, ImageList
from clipsae.data.images import BadImageError
from clipsae.progress import Bar

log = logging.getLogger(__name__)

_PREFETCH = 4  # batches that each worker holds ready
SECONDS = 30.0  # spent on damaged images before a training
_BATCH = 32
# What `find_damage` found in this process, by root and fingerprint.
_found: dict[tuple[str, str], tuple[int, list[str]]] = {}

# A batch: images [B, 3, S, S] or None, labels [B], indices [B], what is wrong with the others.
Read = tuple[Tensor | None, Tensor, Tensor, list[str]]
_Item = tuple[Tensor | None, int, int, str | None]


def read_batches(
    dataset: ImageDataset,
    batches: Iterable[list[int]],
    *,
    num_workers: int = 0,
    pin_memory: bool = False,
    replace: bool = False,
    ahead: int = 0,
) -> DataLoader:
    """Batches of images by their indices, in that order with any number of workers.

    Args:
        dataset: N images.
        batches: the indices of each batch; taken as they are needed, so it may have no end.
        num_workers: processes that read images; 0: this one.
        pin_memory: for faster copies to a GPU.
        replace: put the next readable image in the place of one that is skipped.
        ahead: batches that all workers together hold ready, at least.

    Yields:
        (images uint8 [B, 3, S, S] or None where none was readable, labels [B], indices [B], what
        is wrong with the others: list of str).
    """
    return DataLoader(
        _Indexed(dataset, replace),
        batch_sampler=batches,
        num_workers=num_workers,
        prefetch_factor=max(_PREFETCH, -(-ahead // num_workers)) if num_workers else None,
        collate_fn=_collate,
        pin_memory=pin_memory,
        worker_init_fn=_leave_signals_to_the_parent,
        # Its own generator: the default draws from torch's global one, on which a resumed run
        # and an undisturbed one would then differ.
        generator=torch.Generator().manual_seed(0),
    )


def _leave_signals_to_the_parent(_: int) -> None:
    """A cluster signals each process of a job. Where the parent handles the signal, workers must
    neither end (the parent would fail) nor handle it, too."""
    for number in (signal.SIGTERM, signal.SIGUSR2):
        if callable(signal.getsignal(number)):  # as it was in the parent
            signal.signal(number, signal.SIG_IGN)


class BadImages:
    """Stops at the first unreadable file, or counts them, as the dataset's `on_bad_image` says.

    Args:
        dataset: N images.
        fate: what became of those that were skipped, for the report.
        replaced: whether others take their places.
    """

    def __init__(self, dataset: ImageDataset, fate: str, *, replaced: bool = False) -> None:
        self.skip = skips(dataset)
        self.fate = fate
        self.replaced = replaced
        self.errors: dict[str, None] = {}  # a set that keeps the order
        self._reported = 0

    def checked(self, batches: Iterable[Read]) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Images, labels and indices of what `read_batches` yields, where any are readable.

        Raises:
            BadImageError: an unreadable image of a dataset that does not skip, or no readable one
                to replace it.
        """
        for images, labels, indices, errors in batches:
            if errors and not self.skip:
                raise BadImageError(f"{errors[0]}; on_bad_image=skip goes on without such files")
            self.errors.update(dict.fromkeys(errors))
            if images is not None:
                yield images, labels, indices
            elif self.replaced:
                raise BadImageError("the training set has no image that can be read")

    def report(self) -> None:
        """One warning: how many so far, and the first few; none where nothing is new."""
        if len(self.errors) > self._reported:
            self._reported = len(self.errors)
            log.warning(
                "%d images could not be read and were %s: %s%s",
                len(self.errors),
                self.fate,
                "; ".join(list(self.errors)[:3]),
                "; ..." if len(self.errors) > 3 else "",
            )


def skips(dataset: Any) -> bool:
    """Whether images that cannot be read are skipped."""
    return getattr(dataset, "on_bad_image", "error") == "skip"


class _Indexed(Dataset):
    """Items (image, label, index, error) with an image or an error: an exception would end a worker
    process."""

    def __init__(self, dataset: ImageDataset, replace: bool) -> None:
        self.dataset = dataset
        self.replace = replace and skips(dataset)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitems__(self, indices: list[int]) -> list[_Item]:
        if hasattr(self.dataset, "__getitems__"):
            found = self.dataset.__getitems__(indices)
            return [(image, int(y), i, None) for (image, y), i in zip(found, indices, strict=True)]
        return [item for index in indices for item in self._read(index)]

    def _read(self, index: int) -> list[_Item]:
        """The item; with `replace`, bad ones are followed by the next good one of the dataset."""
        items: list[_Item] = []
        for offset in range(len(self.dataset) if self.replace else 1):
            at = (index + offset) % len(self.dataset)
            try:
                image, label = self.dataset[at]
                return [*items, (image, int(label), at, None)]
            except BadImageError as error:
                items.append((None, -1, at, str(error)))
        return items


def _collate(items: list[_Item]) -> Read:
    good = [(image, label, index) for image, label, index, _ in items if image is not None]
    images, labels, indices = zip(*good, strict=True) if good else ((), (), ())
    return (
        torch.stack(images) if good else None,
        torch.tensor(labels, dtype=torch.long),
        torch.tensor(indices, dtype=torch.long),
        [error for *_, error in items if error is not None],
    )


def refuse_damaged(dataset: ImageDataset, num_workers: int = 0) -> None:
    """Read the images of a list of files in a random order, for at most `SECONDS`, and say how many
    were read where those are not all.

    Nothing is read of a dataset that skips bad images or is no list of files.

    Args:
        num_workers: processes that read images; 0: this one.

    Raises:
        BadImageError: some cannot be read: the first by name, and how many.
    """
    if not isinstance(dataset, ImageList) or skips(dataset):
        return
    with Bar(f"looking for damaged images in {dataset.root}") as bar:
        read, errors = find_damage(dataset, num_workers=num_workers, seconds=SECONDS, progress=bar)
    if errors:
        more = f" ({len(errors):,} such files)" if len(errors) > 1 else ""
        raise BadImageError(
            f"{errors[0]}{more}: repair or remove it, or go on without such files by "
            "on_bad_image=skip"
        )
    if read < len(dataset):
        log.info(
            "%s: looked for damaged images for %.0f s: none among %s of %s; the others are read as "
            "they come",
            *(dataset.root, SECONDS, f"{read:,}", f"{len(dataset):,}"),
        )


def leaves_out(dataset: ImageDataset) -> bool:
    """Whether results of a dataset may lack unreadable images: only with `on_bad_image: skip`. All
    images of a small dataset are read for it, once in a process; a large one is assumed to."""
    if not skips(dataset):
        return False
    if not isinstance(dataset, ImageList) or not dataset.is_small:
        return True
    return bool(find_damage(dataset)[1])


def find_damage(
    dataset: ImageList,
    *,
    num_workers: int = 0,
    seconds: float = float("inf"),
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[int, list[str]]:
    """Read the images in a fixed random order, all of them or as many as the time allows. Results
    are remembered in this process.

    Args:
        num_workers: processes that read images; 0: this one.
        progress: called with the images read, and N.

    Returns:
        How many images were read, and a sentence for each that cannot be.
    """
    key = str(dataset.root), dataset.fingerprint
    if key not in _found:
        order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0))
        batches = [batch.tolist() for batch in order.split(_BATCH)]
        start, read, errors = time.monotonic(), 0, []
        workers = min(num_workers, len(batches) // 8)
        for _, _, good, bad in read_batches(dataset, batches, num_workers=workers):
            read += len(good) + len(bad)
            errors += bad
            progress(read, len(dataset))
            if time.monotonic() - start > seconds:
                break
        _found[key] = read, errors
    return _found[key]

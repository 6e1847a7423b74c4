"""Images that cannot be read, found before anything slow depends on them.

N images of a dataset.
"""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from clipsae.data.dataset import ImageDataset, ImageList
from clipsae.data.images import BadImageError
from clipsae.data.reader import read_batches, skips
from clipsae.progress import Bar

log = logging.getLogger(__name__)

SECONDS = 30.0  # that are spent on looking before a training
_BATCH = 32
_found: dict[tuple[str, str], "Damage"] = {}  # by root and fingerprint, in this process


@dataclass(frozen=True)
class Damage:
    """What was found.

    Attributes:
        read: images that were read, of N.
        errors: what is wrong with those that cannot be read, a sentence each.
    """

    read: int
    errors: list[str]


def refuse_damaged(dataset: ImageDataset, num_workers: int = 0) -> None:
    """Read the images of a list of files in a random order, for at most `SECONDS`, and say how many
    were read where those are not all.

    A dataset that goes on without bad images, or is no list of files, is left alone.

    Args:
        num_workers: processes that read images; 0: this one.

    Raises:
        BadImageError: some cannot be read: the first by name, and how many.
    """
    if not isinstance(dataset, ImageList) or skips(dataset):
        return
    with Bar(f"looking for damaged images in {dataset.root}") as bar:
        found = find_damage(dataset, num_workers=num_workers, seconds=SECONDS, progress=bar)
    if found.errors:
        more = f" ({len(found.errors):,} such files)" if len(found.errors) > 1 else ""
        raise BadImageError(
            f"{found.errors[0]}{more}: mend or remove it, or go on without such files by "
            "on_bad_image=skip"
        )
    if found.read < len(dataset):
        log.info(
            "%s: looked for damaged images for %.0f s: none among %s of %s; the others are read as "
            "they come",
            *(dataset.root, SECONDS, f"{found.read:,}", f"{len(dataset):,}"),
        )


def leaves_out(dataset: ImageDataset) -> bool:
    """Whether what is made of a dataset may lack images that cannot be read.

    Only with `on_bad_image: skip`. Of a small set all images are read to know it, once in a
    process; a large one is taken to lack some.
    """
    if not skips(dataset):
        return False
    if not isinstance(dataset, ImageList) or not dataset.is_small:
        return True
    return bool(find_damage(dataset).errors)


def find_damage(
    dataset: ImageList,
    *,
    num_workers: int = 0,
    seconds: float = float("inf"),
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Damage:
    """Read the images in a fixed random order, all of them or as many as the time allows; what was
    found in this process is not looked for again.

    Args:
        num_workers: processes that read images; 0: this one.
        progress: called with the images read, and N.
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
        _found[key] = Damage(read, errors)
    return _found[key]

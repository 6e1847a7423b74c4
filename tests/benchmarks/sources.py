"""How fast a training is fed: images a second from files, from scenes, from caches of images and of
tokens; and the frozen prefix."""

import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clipsae.data.cache import (
    Cache,
    CacheLoader,
    ImageLayout,
    Layout,
    TokenLayout,
    TokenLoader,
    write_manifest,
    write_shard,
)
from clipsae.data.loader import ResumableLoader, image_batches
from clipsae.data.scenes import ScenesDataset
from tests.benchmarks.setup import Noise, Setup, clip_of, images

BATCH = 32
READ = 256  # photos that are decoded
CORES = (1, 8, 16, 64)
STEP_MS = 3  # of a GPU that is to be fed
WARM_UP = 3  # epochs in which workers start and memory is got from the system


class Ready:
    """A stand-in for CLIP with precomputed tokens: only the writing is measured."""

    layer = -1
    has_captions = False

    def __init__(self, tokens: int, width: int) -> None:
        self.values = torch.randn(64, tokens, width)

    def normalize(self, pixels: Tensor) -> Tensor:
        return pixels

    def prefix(self, pixels: Tensor) -> Tensor:
        return self.values[: len(pixels)]


def measure_features(setup: Setup, report: Callable[[str], None]) -> dict[str, Any]:
    """Images a second of each source, the best of several epochs, one thread a process; those of
    the prefix on all threads. Wall clock."""
    sizes, clip = setup.sizes, clip_of(setup)
    n, rates = sizes.cache_images, {}
    photos = images(setup.images, min(READ, n), clip.image_size)
    prefix = _prefix(clip, photos, setup)
    report(f"prefix: {prefix:.1f} images a second")
    torch.set_num_threads(1)

    def measure(name: str, make: Callable[[], ResumableLoader], cold: Path | None = None) -> None:
        if cold is None:
            rates[name] = max(_rates(make(), WARM_UP + sizes.rounds))
        else:
            rates[name] = max(_from_disk(make(), cold) for _ in range(sizes.rounds))
        report(f"{name}: {rates[name]:,.0f} images a second")

    if setup.images is not None:
        for workers in sizes.workers:
            make = lambda workers=workers: ResumableLoader(photos, BATCH, num_workers=workers)  # noqa: E731
            measure(f"photos, {workers} workers", make)
    scenes = ScenesDataset(size=n)
    measure("scenes", lambda: ResumableLoader(scenes, BATCH))
    layouts: dict[str, tuple[Layout, Any]] = {
        "images": (ImageLayout(images=n, image_size=clip.image_size), CacheLoader),
        "tokens": (TokenLayout(images=n, tokens=clip.tokens, width=clip.width), TokenLoader),
    }
    written = {}  # images a second
    with tempfile.TemporaryDirectory() as name:
        for kind, (layout, loader) in layouts.items():
            folder = Path(name) / kind
            written[kind] = n / write_cache(folder, layout, Ready(clip.tokens, clip.width))
            cache = Cache(folder, kind=type(layout))
            make = lambda cache=cache, loader=loader: loader(cache, BATCH)  # noqa: E731
            measure(f"{kind} in memory", make)
            measure(f"{kind} on disk", make, folder)
    return {
        "clip": sizes.clip[0],
        "image_size": clip.image_size,
        "photo_kb": _mean_kb(photos) if setup.images is not None else None,
        "prefix": prefix,
        "rates": rates,
        "written": written["tokens"],
        "kb": {kind: layout.image_bytes / 1e3 for kind, (layout, _) in layouts.items()},
        "cache_images": n,
        "batch": BATCH,
        "step_ms": STEP_MS,
        "cores": list(CORES),
    }


def _rates(loader: ResumableLoader, epochs: int) -> list[float]:
    """Images a second in each of some epochs."""
    found = []
    for _ in range(epochs):
        start = time.perf_counter()
        found.append(sum(len(batch) for batch in loader) / (time.perf_counter() - start))
    loader.close()
    return found


def _from_disk(loader: ResumableLoader, folder: Path) -> float:
    """The same in one epoch whose files are not in the system's memory."""
    for file in folder.iterdir():
        with file.open("rb") as opened:
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return _rates(loader, 1)[0]


def write_cache(folder: Path, layout: Layout, clip: Ready) -> float:
    """Write a cache of random images; the seconds."""
    folder.mkdir()
    pixels = Noise([0] * layout.images, layout.shape[-1] if layout.HOLDS == "pixels" else 8)
    start = time.perf_counter()
    for shard in range(layout.shards):
        write_shard(folder, layout, shard, clip, pixels)
    seconds = time.perf_counter() - start
    files = [folder / layout.file(shard) for shard in range(layout.shards)]
    for file in files:  # what is not on the disk cannot be read from it
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
    write_manifest(folder, layout, {}, [{"bytes": file.stat().st_size} for file in files])
    return seconds


@torch.inference_mode()
def _prefix(clip: Any, photos: Any, setup: Setup) -> float:
    """Images a second of the frozen prefix."""
    batch = next(iter(image_batches(photos, 8 if setup.device == "cpu" else BATCH)))[0]
    step = lambda: clip.prefix(clip.normalize(batch.to(setup.device)))  # noqa: E731
    step()
    return len(batch) / min(setup.seconds(step) for _ in range(2))


def _mean_kb(photos: Any) -> float:
    sizes = [(photos.root / file).stat().st_size for file in photos.files]
    return sum(sizes) / len(sizes) / 1e3

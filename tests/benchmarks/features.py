"""Reading images, the frozen prefix, and the feature cache."""

import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clipsae.clip import FrozenCLIP
from clipsae.data.cache import CachedLoader, Layout, TokenCache, write_manifest, write_shard
from clipsae.data.loader import image_batches
from clipsae.store.files import sha256
from tests.benchmarks.images import Noise, images
from tests.benchmarks.setup import Setup

BATCH = 32
READ = 256  # images that are decoded


class Ready:
    """A stand-in for CLIP whose tokens are there already: what is left is the writing."""

    def __init__(self, tokens: int, width: int) -> None:
        self.values = torch.randn(64, tokens, width)

    def normalize(self, pixels: Tensor) -> Tensor:
        return pixels

    def prefix(self, pixels: Tensor) -> Tensor:
        return self.values[: len(pixels)]


def measure_features(setup: Setup, report: Callable[[str], None]) -> dict[str, Any]:
    """Images decoded, prefixes and cached tokens per second, by the clock on the wall."""
    sizes = setup.sizes
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of random weights, which are meant here
        clip = FrozenCLIP.load(*sizes.clip).to(setup.device)
    n = min(READ, sizes.cache_images)
    dataset = images(setup.images, n, clip.image_size)
    decoded = {}
    if setup.images is not None:
        for workers in sizes.workers:
            start = time.perf_counter()
            for _ in image_batches(dataset, BATCH, workers):
                pass
            decoded[workers] = n / (time.perf_counter() - start)
            report(f"{workers} workers: {decoded[workers]:.0f} images decoded a second")
    batch = next(iter(image_batches(dataset, BATCH)))[0]
    with torch.inference_mode():
        batch = batch[:8] if setup.device == "cpu" else batch
        step = lambda: clip.prefix(clip.normalize(batch.to(setup.device)))  # noqa: E731
        step()
        prefix = len(batch) / min(setup.seconds(step) for _ in range(2))
    report(f"prefix: {prefix:.1f} images a second")

    layout = Layout(sizes.cache_images, clip.tokens, clip.width, shard_images=1024)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        start = time.perf_counter()
        pixels = Noise([0] * sizes.cache_images, 8)
        for shard in range(layout.shards):
            write_shard(folder, layout, shard, Ready(clip.tokens, clip.width), pixels)
        written = time.perf_counter() - start
        files = [folder / layout.file(shard) for shard in range(layout.shards)]
        write_manifest(
            folder, layout, {}, [{"bytes": f.stat().st_size, "sha256": sha256(f)} for f in files]
        )
        loader = CachedLoader(
            TokenCache(folder), BATCH, block_images=64, buffer_images=512, shuffle_images=BATCH * 2
        )
        start = time.perf_counter()
        batches = sum(1 for _ in loader)
        read = time.perf_counter() - start
        loader.close()
    tokens = sizes.cache_images * clip.tokens
    found = {
        "clip": sizes.clip[0],
        "decoded": decoded,
        "prefix": prefix,
        "write_tokens_per_s": tokens / written,
        "read_tokens_per_s": batches * BATCH * clip.tokens / read,
        "read_gb_per_s": batches * BATCH * layout.image_bytes / read / 1e9,
        "image_kb": layout.image_bytes / 1e3,
        "cache_images": sizes.cache_images,
    }
    report(
        f"cache: {found['write_tokens_per_s']:,.0f} tokens written a second, "
        f"{found['read_tokens_per_s']:,.0f} read"
    )
    return found

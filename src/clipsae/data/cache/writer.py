"""Computes the tokens of one shard and writes them as they come: memory holds one batch.

T tokens of an image, d width, n images of the shard.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from clipsae.clip import FrozenCLIP
from clipsae.data.cache.layout import DTYPES, Layout
from clipsae.data.dataset import ImageDataset
from clipsae.data.reader import BadImages, read_batches

BATCH = 64  # not an option: the last bit of a token may depend on its batch


@torch.inference_mode()
def write_shard(
    folder: Path,
    layout: Layout,
    shard: int,
    clip: FrozenCLIP,
    dataset: ImageDataset,
    *,
    num_workers: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Write `layout.file(shard)` into a folder.

    Args:
        clip: on the device that computes.
        dataset: N images; one that cannot be read stops it, or with `on_bad_image: skip` has the
            next one's tokens in its place, and is reported.
        num_workers: processes that read images; 0: this one.
        progress: called with the images written, and n.

    Raises:
        BadImageError: an image that cannot be read.
        ValueError: tokens that the dtype cannot hold.
    """
    start, n = shard * layout.shard_images, layout.count(shard)
    images = layout.order()[start : start + n]
    batches = [chunk.tolist() for chunk in images.split(BATCH)]
    bad = BadImages(dataset, "replaced by the next in the feature cache", replaced=True)
    reader = read_batches(
        dataset,
        batches,
        num_workers=min(num_workers, len(batches)),
        pin_memory=torch.cuda.is_available(),
        replace=True,
    )
    sources, done = [], 0
    with (folder / layout.file(shard)).open("wb") as file:
        file.write(layout.header(shard))
        for pixels, _, indices in bad.checked(reader):
            tokens = clip.prefix(clip.normalize(pixels)).to(DTYPES[layout.dtype])
            if layout.dtype == "fp16" and not tokens.isfinite().all():
                raise ValueError(
                    "features.cache.dtype=fp16: some tokens are beyond 65,504; use bf16 or fp32"
                )
            file.write(_bytes(tokens))
            sources.append(indices)
            done += len(indices)
            progress(done, n)
        file.write(_bytes(images))
        file.write(_bytes(torch.cat(sources)))
    bad.report()


def _bytes(values: Tensor) -> memoryview:
    return values.cpu().contiguous().flatten().view(torch.uint8).numpy().data

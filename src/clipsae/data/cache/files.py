"""The files of a feature cache: the order of the images, their shards, the manifest; writing them.

N images, T tokens of an image, d width, n images of a shard.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clipsae.clip import FrozenCLIP
from clipsae.data.dataset import ImageDataset
from clipsae.data.loader import permutation
from clipsae.data.reader import BadImages, read_batches

FORMAT = "clipsae feature cache"
VERSION = 1
MANIFEST = "manifest.json"
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
CODES = {"bf16": "BF16", "fp16": "F16", "fp32": "F32"}  # as safetensors calls them
ROUND = 64  # images that a shard holds a multiple of, if it holds so many
BATCH = 64  # not an option: the last bit of a token may depend on its batch


@dataclass(frozen=True)
class Layout:
    """Sizes and order of a cache.

    Attributes:
        images: N.  tokens: T.  width: d.
        dtype: "bf16", "fp16" or "fp32".
        order_seed: decides in which order the images are written.
        shard_images: images of every shard but the last, which has the rest.

    Raises:
        ValueError: an unknown dtype, or an invalid size.
    """

    images: int
    tokens: int
    width: int
    dtype: str = "bf16"
    order_seed: int = 0
    shard_images: int = 1024

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype={self.dtype!r}: expected one of {', '.join(DTYPES)}")
        for name in ("images", "tokens", "width", "shard_images"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 1")

    @classmethod
    def of_shards(cls, shard_gb: float, **sizes: Any) -> "Layout":
        """A layout with shards of about so many gigabytes (10^9 bytes) each.

        Raises:
            ValueError: an invalid size.
        """
        if not shard_gb > 0:
            raise ValueError(f"shard_gb={shard_gb}: expected a number of gigabytes above 0")
        count = max(1, int(shard_gb * 1e9 / cls(**sizes).image_bytes))
        return cls(**sizes, shard_images=count - count % ROUND if count > ROUND else count)

    @property
    def image_bytes(self) -> int:
        """Bytes of an image's tokens."""
        return self.tokens * self.width * DTYPES[self.dtype].itemsize

    @property
    def shards(self) -> int:
        """Number of shards."""
        return -(-self.images // self.shard_images)

    def file(self, shard: int) -> str:
        """A shard's file name."""
        return f"tokens-{shard:05d}.safetensors"

    def count(self, shard: int) -> int:
        """n, images of a shard."""
        return min(self.shard_images, self.images - shard * self.shard_images)

    def order(self) -> Tensor:
        """The images in the order in which they are written, LongTensor [N]."""
        return permutation(self.images, self.order_seed)

    def header(self, shard: int) -> bytes:
        """All that comes before the data in a shard's file, as safetensors specifies it."""
        n = self.count(shard)
        parts = {
            "tokens": (CODES[self.dtype], [n, self.tokens, self.width], n * self.image_bytes),
            "images": ("I64", [n], 8 * n),
            "sources": ("I64", [n], 8 * n),
        }
        at, fields = 0, {}
        for name, (dtype, shape, size) in parts.items():
            fields[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + size]}
            at += size
        text = json.dumps(fields).encode()
        text += b" " * (-len(text) % 8)  # data that is aligned can be mapped
        return len(text).to_bytes(8, "little") + text

    def bytes(self, shard: int) -> int:
        """Size of a shard's file."""
        return len(self.header(shard)) + self.count(shard) * (self.image_bytes + 16)


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


def write_manifest(
    folder: Path, layout: Layout, contents: Mapping[str, Any], sealed: Sequence[Mapping[str, Any]]
) -> None:
    """Describe the shards of a folder.

    Args:
        contents: what decides the tokens: the CLIP, the dataset, the split, the preprocessing.
        sealed: of each shard "bytes" and "sha256".
    """
    shards = [
        {"file": layout.file(i), "images": layout.count(i), **about}
        for i, about in enumerate(sealed)
    ]
    content = {"format": FORMAT, "version": VERSION, "of": dict(contents), **asdict(layout)}
    text = json.dumps({**content, "shards": shards}, indent=2)
    (folder / MANIFEST).write_text(text + "\n")


def read_manifest(folder: Path) -> tuple[Layout, dict[str, Any], list[int]]:
    """The layout, what decides the tokens, and the bytes of each shard's file.

    Raises:
        ValueError: no manifest, or not one of this version.
    """
    path = folder / MANIFEST
    try:
        content = json.loads(path.read_text())
        if (content["format"], content["version"]) != (FORMAT, VERSION):
            raise ValueError(
                f"{path} is of {content['format']!r}, version {content['version']}: expected "
                f"{FORMAT!r}, version {VERSION}; remove the folder, and it is recomputed"
            )
        layout = Layout(**{name: content[name] for name in Layout.__dataclass_fields__})
        counts = [shard["images"] for shard in content["shards"]]
        if counts != [layout.count(i) for i in range(layout.shards)]:
            raise ValueError(
                f"{path} lists shards that are not {layout.images} images: remove the folder, and "
                "it is recomputed"
            )
        return layout, dict(content["of"]), [shard["bytes"] for shard in content["shards"]]
    except FileNotFoundError as error:
        raise ValueError(f"{folder} has no {MANIFEST}: expected a feature cache") from error
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(
            f"{path} is no manifest of a feature cache ({error!r}): remove the folder, and it is "
            "recomputed"
        ) from error

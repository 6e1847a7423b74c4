"""The files of a cache of tokens or of decoded images: their order, the shards, the manifest;
writing them.

N images, T tokens of an image, d width, S image side, n images of a shard.
"""

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, fields
from math import prod
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from clipsae.clip import FrozenCLIP
from clipsae.data.captions import texts_of
from clipsae.data.dataset import ImageDataset
from clipsae.data.loader import permutation
from clipsae.data.reader import BadImages, read_batches

VERSION = 1
MANIFEST = "manifest.json"
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
CODES = {  # as safetensors calls them
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float32: "F32",
    torch.uint8: "U8",
}
ROUND = 64  # images that a shard holds a multiple of, if it holds so many
BATCH = 64  # not an option: the last bit of a token may depend on its batch


@dataclass(frozen=True, kw_only=True)
class Layout(ABC):
    """Sizes and order of a cache.

    Attributes:
        images: N.
        shard_images: images of every shard but the last, which has the rest.
        shape, numbers: of what is kept of an image, and the dtype.
        NAME: what users call such a cache.
        HOLDS: the tensor in its files, and the beginning of their names.

    Raises:
        ValueError: an invalid size or dtype.
    """

    images: int
    shard_images: int = 1024
    NAME: ClassVar[str]
    HOLDS: ClassVar[str]

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type is int and field.name != "order_seed" and value < 1:
                raise ValueError(f"{field.name}={value}: must be at least 1")

    @property
    @abstractmethod
    def shape(self) -> tuple[int, ...]: ...

    @property
    @abstractmethod
    def numbers(self) -> torch.dtype: ...

    @abstractmethod
    def order(self) -> Tensor:
        """The images in the order in which they are written, LongTensor [N]."""

    @abstractmethod
    def encode(
        self, clip: FrozenCLIP, images: Tensor, texts: Tensor | None, layers: Sequence[int]
    ) -> list[Tensor]:
        """What is kept of images uint8 [B, 3, S, S]: `numbers` [B, *shape], of each layer.

        Args:
            texts: their tokenised captions [B, context], where the CLIP has them.

        Raises:
            ValueError: numbers that the dtype cannot hold.
        """

    @classmethod
    def of_shards(cls, shard_gb: float, **sizes: Any) -> Self:
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
        """Bytes that are kept of an image."""
        return prod(self.shape) * self.numbers.itemsize

    @property
    def shards(self) -> int:
        """Number of shards."""
        return -(-self.images // self.shard_images)

    def file(self, shard: int) -> str:
        """A shard's file name."""
        return f"{self.HOLDS}-{shard:05d}.safetensors"

    def count(self, shard: int) -> int:
        """n, images of a shard."""
        return min(self.shard_images, self.images - shard * self.shard_images)

    def header(self, shard: int) -> bytes:
        """All that comes before the data in a shard's file, as safetensors specifies it."""
        n = self.count(shard)
        parts = {
            self.HOLDS: (CODES[self.numbers], [n, *self.shape], n * self.image_bytes),
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


@dataclass(frozen=True, kw_only=True)
class TokenLayout(Layout):
    """Tokens [N, T, d] in a random order: any stretch is a random sample of the dataset.

    Attributes:
        tokens: T.  width: d.
        dtype: "bf16", "fp16" or "fp32".
        order_seed: decides the order.
    """

    tokens: int
    width: int
    dtype: str = "bf16"
    order_seed: int = 0
    NAME = "feature cache"
    HOLDS = "tokens"

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype={self.dtype!r}: expected one of {', '.join(DTYPES)}")
        super().__post_init__()

    @property
    def shape(self) -> tuple[int, ...]:
        return self.tokens, self.width

    @property
    def numbers(self) -> torch.dtype:
        return DTYPES[self.dtype]

    def __str__(self) -> str:
        return f"{self.images:,} images x {self.tokens} tokens x {self.width} in {self.dtype}"

    def order(self) -> Tensor:
        return permutation(self.images, self.order_seed)

    def encode(
        self, clip: FrozenCLIP, images: Tensor, texts: Tensor | None, layers: Sequence[int]
    ) -> list[Tensor]:
        pixels = clip.normalize(images)
        if texts is not None:
            streams = [clip.pairs(pixels, texts)]
        elif len(layers) == 1:
            streams = [clip.prefix(pixels)]
        else:
            found = clip.prefixes(pixels, layers)
            streams = [found[layer] for layer in layers]
        tokens = [stream.to(self.numbers) for stream in streams]
        if self.dtype == "fp16" and not all(one.isfinite().all() for one in tokens):
            raise ValueError(
                "features.cache.dtype=fp16: some tokens are beyond 65,504; use bf16 or fp32"
            )
        return tokens


@dataclass(frozen=True, kw_only=True)
class ImageLayout(Layout):
    """Decoded images [N, 3, S, S] in the dataset's order.

    Attributes:
        image_size: S.
    """

    image_size: int
    NAME = "image cache"
    HOLDS = "pixels"
    numbers = torch.uint8

    @property
    def shape(self) -> tuple[int, ...]:
        return 3, self.image_size, self.image_size

    def __str__(self) -> str:
        return f"{self.images:,} images of {self.image_size} x {self.image_size} pixels"

    def order(self) -> Tensor:
        return torch.arange(self.images)

    def encode(
        self, clip: FrozenCLIP, images: Tensor, texts: Tensor | None, layers: Sequence[int]
    ) -> list[Tensor]:
        return [images for _ in layers]


@torch.inference_mode()
def write_shard(
    folder: Path | Mapping[int, Path],
    layout: Layout,
    shard: int,
    clip: FrozenCLIP,
    dataset: ImageDataset,
    *,
    num_workers: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Write `layout.file(shard)` into a folder, or of several layers into one for each, in one pass
    over the images.

    Args:
        folder: of the layer of `clip`; or the folders by layer.
        clip: on the device that computes.
        dataset: N images; one that cannot be read stops it, or with `on_bad_image: skip` has the
            next one in its place, and is reported.
        num_workers: processes that read images; 0: this one.
        progress: called with the images written, and n.

    Raises:
        BadImageError: an image that cannot be read.
        ValueError: tokens that the dtype cannot hold.
    """
    start, n = shard * layout.shard_images, layout.count(shard)
    images = layout.order()[start : start + n]
    batches = [chunk.tolist() for chunk in images.split(BATCH)]
    bad = BadImages(dataset, f"replaced by the next in the {layout.NAME}", replaced=True)
    reader = read_batches(
        dataset,
        batches,
        num_workers=min(num_workers, len(batches)),
        pin_memory=torch.cuda.is_available(),
        replace=True,
    )
    folders = folder if isinstance(folder, Mapping) else {clip.layer: folder}
    texts = texts_of(clip, dataset)
    sources, done = [], 0
    with ExitStack() as opened:
        names = [one / layout.file(shard) for one in folders.values()]
        files = [opened.enter_context(name.open("wb")) for name in names]
        for file in files:
            file.write(layout.header(shard))
        for pixels, _, indices in bad.checked(reader):
            said = None if texts is None else texts(indices)
            encoded = layout.encode(clip, pixels, said, list(folders))
            for file, kept in zip(files, encoded, strict=True):
                file.write(_bytes(kept))
            sources.append(indices)
            done += len(indices)
            progress(done, n)
        for file in files:
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
        contents: what decides what is kept: the dataset, the split, of tokens the CLIP.
        sealed: of each shard "bytes" and "sha256".
    """
    shards = [
        {"file": layout.file(i), "images": layout.count(i), **about}
        for i, about in enumerate(sealed)
    ]
    head = {"format": f"clipsae {layout.NAME}", "version": VERSION, "of": dict(contents)}
    text = json.dumps({**head, **asdict(layout), "shards": shards}, indent=2)
    (folder / MANIFEST).write_text(text + "\n")


def read_manifest(folder: Path, kind: type[Layout]) -> tuple[Layout, dict[str, Any], list[int]]:
    """The layout, what decides what is kept of an image, and the bytes of each shard's file.

    Raises:
        ValueError: no manifest, or not one of this kind and version.
    """
    path = folder / MANIFEST
    expected = f"clipsae {kind.NAME}"
    try:
        content = json.loads(path.read_text())
        if (content["format"], content["version"]) != (expected, VERSION):
            raise ValueError(
                f"{path} is of {content['format']!r}, version {content['version']}: expected "
                f"{expected!r}, version {VERSION}; remove the folder, and it is recomputed"
            )
        layout = kind(**{field.name: content[field.name] for field in fields(kind)})
        counts = [shard["images"] for shard in content["shards"]]
        if counts != [layout.count(i) for i in range(layout.shards)]:
            raise ValueError(
                f"{path} lists shards that are not {layout.images} images: remove the folder, and "
                "it is recomputed"
            )
        return layout, dict(content["of"]), [shard["bytes"] for shard in content["shards"]]
    except FileNotFoundError as error:
        raise ValueError(f"{folder} is no {kind.NAME}: it has no {MANIFEST}") from error
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(
            f"{path} does not describe the {kind.NAME} ({error!r}): remove the folder, and it is "
            "recomputed"
        ) from error

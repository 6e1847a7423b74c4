"""Datasets and caches whose tokens say which image they are of: token t of image i is 4 i + t."""

from pathlib import Path

import torch
from torch import nn
from torch.utils.data import Dataset

from clipsae.data.cache import Cache, TokenLayout, write_manifest, write_shard
from clipsae.store.files import sha256

T = 4


class Numbers(Dataset):
    """Image i: its number, in three digits to the base 256."""

    def __init__(self, n: int) -> None:
        self.labels = torch.arange(n)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int):
        digits = [index % 256, index // 256 % 256, index // 65536]
        return torch.tensor(digits, dtype=torch.uint8).view(3, 1, 1), index


class Counting(nn.Module):
    """A stand-in for the frozen CLIP: tokens 4 i + (0, 1, 2, 3), [B, 4, 1], the class token first.
    After the block before they have the other sign; the embedding is the tokens' sum and 1."""

    device = torch.device("cpu")
    hook = "resid"
    tokens, has_captions = T, False

    def __init__(self, layer: int = -1) -> None:
        super().__init__()
        self.layer = layer

    def at(self, layer):
        return Counting(layer)

    def token_slice(self, tokens):
        return {"all": slice(None), "patches": slice(1, None), "cls": slice(1)}[tokens]

    def prefixes(self, images, layers, with_context=False):
        return {layer: Counting(layer).prefix(images, with_context) for layer in layers}

    def tail(self, tokens, context=None):
        total = tokens.sum(dim=1)
        return torch.cat((total, torch.ones_like(total)), dim=1)

    def normalize(self, images):
        return images.float()

    def prefix(self, images, with_context=False):
        index = images.flatten(1) @ torch.tensor([1.0, 256.0, 65536.0])
        tokens = (index[:, None] * T + torch.arange(T)).unsqueeze(-1)
        tokens = tokens if self.layer == -1 else -tokens
        return (tokens, None) if with_context else tokens


def write_cache(folder: Path, n: int, *, clip=None, dataset=None, about=None, **options) -> Cache:
    """Write a cache as a stage would, and open it."""
    options = {"tokens": T, "width": 1, "dtype": "fp32", "shard_images": 100, **options}
    layout = TokenLayout(images=n, **options)
    folder.mkdir()
    for shard in range(layout.shards):
        write_shard(folder, layout, shard, clip or Counting(), dataset or Numbers(n))
    files = [folder / layout.file(shard) for shard in range(layout.shards)]
    sealed = [{"bytes": f.stat().st_size, "sha256": sha256(f)} for f in files]
    write_manifest(folder, layout, about or {"clip": "counting"}, sealed)
    return Cache(folder)

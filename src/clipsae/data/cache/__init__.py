"""Tokens or decoded images on disk, computed once: `docs/feature-cache.md` specifies the format."""

from clipsae.data.cache.files import (
    MANIFEST,
    VERSION,
    ImageLayout,
    Layout,
    TokenLayout,
    write_manifest,
    write_shard,
)
from clipsae.data.cache.loader import CacheLoader, TokenLoader
from clipsae.data.cache.reader import Cache, Caches

__all__ = [
    "MANIFEST",
    "VERSION",
    "Cache",
    "CacheLoader",
    "Caches",
    "ImageLayout",
    "Layout",
    "TokenLayout",
    "TokenLoader",
    "write_manifest",
    "write_shard",
]

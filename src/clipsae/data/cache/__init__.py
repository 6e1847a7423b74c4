"""Token features on disk, computed once: `docs/feature-cache.md` specifies the format."""

from clipsae.data.cache.files import DTYPES, MANIFEST, VERSION, Layout, write_manifest, write_shard
from clipsae.data.cache.loader import CachedLoader
from clipsae.data.cache.reader import TokenCache

__all__ = [
    "DTYPES",
    "MANIFEST",
    "VERSION",
    "CachedLoader",
    "Layout",
    "TokenCache",
    "write_manifest",
    "write_shard",
]

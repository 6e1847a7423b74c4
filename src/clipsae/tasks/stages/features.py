"""Kind "features": the tokens of the training images on disk. `manifest.json`,
`tokens-*.safetensors` (docs/feature-cache.md).

While a cache is being made, each of its shards is a stage of kind "shards". So several jobs make a
cache together, a killed one loses the shard it was at, and `task=status` shows how far they are.
The finished cache takes the shards over by hard links, which cost nothing.
"""

import logging
import shutil
import time
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from clipsae.clip import FrozenCLIP
from clipsae.data import FeatureDataModule, ImageDataset
from clipsae.data.cache import (
    MANIFEST,
    VERSION,
    Layout,
    TokenCache,
    write_manifest,
    write_shard,
)
from clipsae.data.cache.loader import check_reading
from clipsae.data.reader import leaves_out
from clipsae.errors import ConfigError
from clipsae.store import MARK, Busy, Stage, Store, find_damage
from clipsae.store.files import free_bytes, read_json, sha256
from clipsae.tasks import build, precision

log = logging.getLogger(__name__)

SPLIT = "train"


def cached(cfg: DictConfig) -> bool:
    """Whether tokens are read from disk."""
    return cfg.features.get("cache") is not None


def training_key(cfg: DictConfig) -> dict[str, Any]:
    """What of `cfg.features` decides an SAE's weights."""
    options = build.decisive("features", cfg.features)
    if cached(cfg):
        options["cache"] = build.decisive("features", cfg.features.cache)
    return options


def content_key(cfg: DictConfig, train_set: ImageDataset) -> dict[str, Any]:
    """What the tokens are of: all that decides them but how they are written."""
    return {
        "clip": build.clip_key(cfg),
        "dataset": cfg.train_dataset.name,
        "fingerprint": train_set.fingerprint,
        "on_bad_image": "skip" if leaves_out(train_set) else "error",
        "split": SPLIT,
        "image_size": train_set.image_size,
    }


def stage(cfg: DictConfig, train_set: ImageDataset) -> Stage:
    """The place of the cache."""
    return _stage(cfg, train_set, "features", [], {})


def _stage(
    cfg: DictConfig, train_set: ImageDataset, kind: str, words: list[str], more: dict[str, Any]
) -> Stage:
    options, dataset = cfg.features.cache, cfg.train_dataset.name
    written = {"format": VERSION, "dtype": options.dtype, "order_seed": options.order_seed}
    return Store(options.folder).stage(
        kind,
        [dataset, SPLIT, cfg.clip.name, options.dtype, *words],
        {**content_key(cfg, train_set), **written, **more},
        {"dataset": dataset, "clip": cfg.clip.name},
    )


class _Cache:
    """A cache, its shards and its sizes.

    Raises:
        ConfigError: an invalid option.
    """

    def __init__(self, cfg: DictConfig, clip: FrozenCLIP, train_set: ImageDataset) -> None:
        self.cfg, self.clip, self.train_set = cfg, clip, train_set
        options = {k: v for k, v in build.plain(cfg.features.cache).items() if k != "folder"}
        self.sizes: Layout = build.user_error(
            Layout.of_shards, images=len(train_set), tokens=clip.tokens, width=clip.width, **options
        )
        self.stage = stage(cfg, train_set)
        size = {"shard_images": self.sizes.shard_images}
        self.shards = [
            _stage(cfg, train_set, "shards", [f"{i:05d}"], {**size, "shard": i})
            for i in range(self.sizes.shards)
        ]

    def is_there(self, content: bool) -> bool:
        """Whether it is finished, and as it was sealed."""
        path = self.stage.path
        return path.exists() and find_damage(path, content=content) is None

    def found(self, i: int) -> Path | None:
        """A shard's file of the right size in a damaged cache, set aside or not yet."""
        path = self.stage.path
        for folder in (path, *sorted(path.parent.glob(f".{path.name}.damaged-*"))):
            file = folder / self.sizes.file(i)
            if file.is_file() and file.stat().st_size == self.sizes.bytes(i):
                return file
        return None

    def make_shard(self, i: int, wait: bool) -> None:
        """Make a shard, unless another job does and we do not wait."""
        number = f"shard {i + 1} of {self.sizes.shards}"

        def write(folder: Path) -> None:
            found = self.found(i)
            if found is not None and sha256(found) == _checksum(found) and _linked(found, folder):
                log.info("%s is complete: kept", number)
                return
            start = time.monotonic()
            write_shard(
                folder,
                self.sizes,
                i,
                self.clip,
                self.train_set,
                num_workers=self.cfg.features.num_workers,
                progress=self.shards[i].progress,
            )
            rate = self.sizes.count(i) / (time.monotonic() - start)
            log.info("%s written: %.0f images/s", number, rate)

        try:
            self.shards[i].make(write, wait=wait, check="size")
        except Busy:
            log.info("%s is computed by another job", number)

    def assemble(self, folder: Path) -> None:
        """Put the finished shards into the cache's folder, and describe them."""
        content = content_key(self.cfg, self.train_set)
        sealed = []
        for i, shard in enumerate(self.shards):
            file = self.sizes.file(i)
            sealed.append(read_json(shard.path / MARK)["files"][file])
            if not _linked(shard.path / file, folder):
                # A kill before the cache is finished costs this shard.
                (shard.path / file).rename(folder / file)
        write_manifest(folder, self.sizes, content, sealed)
        TokenCache(folder, content)  # each image once


def check(
    cfg: DictConfig, clip: FrozenCLIP, train_set: ImageDataset, *, content: bool = False
) -> None:
    """Say what the disk will need and has; nothing where the cache is there.

    Raises:
        ConfigError: an invalid option, or a disk that is too small.
    """
    build.user_error(check_reading, cfg.features.block_images, cfg.features.buffer_images)
    cache = _Cache(cfg, clip, train_set)
    sizes, name = cache.sizes, cache.stage.path.name
    if cache.is_there(content):
        log.info("using the feature cache %s", cache.stage.path)
        return
    missing = [
        i for i, shard in enumerate(cache.shards) if not shard.finished and not cache.found(i)
    ]
    needed = sum(sizes.bytes(i) for i in missing)
    folder = Path(cfg.features.cache.folder)
    free = free_bytes(folder)
    what = f"{sizes.images:,} images x {sizes.tokens} tokens x {sizes.width} in {sizes.dtype}"
    if needed > free:
        raise ConfigError(
            f"{what} of {name} need {needed / 1e9:,.1f} GB, and {folder} has {free / 1e9:,.1f} GB "
            "free: make space, set features.cache.folder to a larger disk, or use features=online"
        )
    log.info(
        "%s of %s: %.2f GB to write in %d of %d shards; %s has %.1f GB free",
        *(what, name, needed / 1e9, len(missing), sizes.shards, folder, free / 1e9),
    )


def make(
    cfg: DictConfig, clip: FrozenCLIP, train_set: ImageDataset, *, content: bool = False
) -> Path:
    """The folder of the finished cache, made first where it is missing or damaged, together with
    other jobs that want it.

    Args:
        content: compare what is there with its checksums; otherwise its sizes.
    """
    cache = _Cache(cfg, clip, train_set)
    whole = cache.stage
    if not cache.is_there(content):
        clip.to(build.best_device())
        precision.apply(cfg, clip)
        log.info("%s", precision.described(cfg))
        # First the shards that nobody works on; then what others have not finished.
        for wait in (False, True):
            for i in range(cache.sizes.shards):
                if content or not whole.finished:
                    cache.make_shard(i, wait)
        whole.make(cache.assemble, check="content" if content else "size")
    for shard in cache.shards:  # links to what the cache has now
        shutil.rmtree(shard.path, ignore_errors=True)
    return whole.path


def data_module(
    cfg: DictConfig,
    clip: FrozenCLIP,
    train_set: ImageDataset,
    val_set: ImageDataset | None = None,
    *,
    cache: TokenCache | None = None,
) -> FeatureDataModule:
    """What streams tokens to the training.

    Args:
        cache: of `open_cache`; None: tokens are computed from images.

    Raises:
        ConfigError: invalid sizes.
    """
    options = {k: v for k, v in build.plain(cfg.features).items() if k != "cache"}
    return build.user_error(
        FeatureDataModule,
        clip,
        train_set,
        val_dataset=val_set,
        seed=cfg.seed,
        cache=cache,
        **options,
    )


def open_cache(cfg: DictConfig, clip: FrozenCLIP, train_set: ImageDataset) -> TokenCache | None:
    """The cache, made first where it is missing; None for features=online.

    Raises:
        ConfigError: what lies there is not this cache.
    """
    if not cached(cfg):
        return None
    folder = make(cfg, clip, train_set)
    return build.user_error(TokenCache, folder, content_key(cfg, train_set))


def _checksum(path: Path) -> str | None:
    """What a shard's SHA-256 should be by the cache's seal, or if that is damaged its manifest."""
    manifest = read_json(path.parent / MANIFEST).get("shards", [])
    known = {shard["file"]: shard for shard in manifest}
    known.update(read_json(path.parent / MARK).get("files", {}))
    return known.get(path.name, {}).get("sha256")


def _linked(file: Path, folder: Path) -> bool:
    """Give a file a second place; False where the file system has no hard links."""
    try:
        (folder / file.name).hardlink_to(file)
    except OSError:
        return False
    return True

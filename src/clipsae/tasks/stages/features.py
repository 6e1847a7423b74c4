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
from clipsae.store.files import read_json, sha256
from clipsae.tasks import build

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


def layout(cfg: DictConfig, clip: FrozenCLIP, train_set: ImageDataset) -> Layout:
    """Sizes of the cache.

    Raises:
        ConfigError: an invalid option.
    """
    options = {k: v for k, v in build.plain(cfg.features.cache).items() if k != "folder"}
    return build.user_error(
        Layout.of_shards, images=len(train_set), tokens=clip.tokens, width=clip.width, **options
    )


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
    key = {**content_key(cfg, train_set), **_written(cfg)}
    return _store(cfg).stage("features", _words(cfg), key, _about(cfg))


def check(
    cfg: DictConfig, clip: FrozenCLIP, train_set: ImageDataset, *, content: bool = False
) -> None:
    """Say what the disk will need and has; nothing where the cache is there.

    Raises:
        ConfigError: an invalid option, or a disk that is too small.
    """
    build.user_error(check_reading, cfg.features.block_images, cfg.features.buffer_images)
    sizes = layout(cfg, clip, train_set)
    whole = stage(cfg, train_set)
    if _is_there(whole, content):
        log.info("using the feature cache %s", whole.path)
        return
    shards = _shards(cfg, sizes, train_set)
    missing = [
        i for i in range(sizes.shards) if not shards[i].finished and not _found(whole, sizes, i)
    ]
    needed = sum(sizes.bytes(i) for i in missing)
    folder = Path(cfg.features.cache.folder)
    free = shutil.disk_usage(_existing(folder)).free
    what = (
        f"{sizes.images:,} images x {sizes.tokens} tokens x {sizes.width} in {sizes.dtype} of "
        f"{whole.path.name}"
    )
    if needed > free:
        raise ConfigError(
            f"{what} need {needed / 1e9:,.1f} GB, and {folder} has {free / 1e9:,.1f} GB free: "
            "make space, set features.cache.folder to a larger disk, or use features=online"
        )
    log.info(
        "%s: %.2f GB to write in %d of %d shards; %s has %.1f GB free",
        *(what, needed / 1e9, len(missing), sizes.shards, folder, free / 1e9),
    )


def make(
    cfg: DictConfig, clip: FrozenCLIP, train_set: ImageDataset, *, content: bool = False
) -> Path:
    """The folder of the finished cache, made first where it is missing or damaged, together with
    other jobs that want it.

    Args:
        content: compare what is there with its checksums; otherwise sizes are looked at.
    """
    sizes = layout(cfg, clip, train_set)
    whole = stage(cfg, train_set)
    shards = _shards(cfg, sizes, train_set)
    if not _is_there(whole, content):
        clip.to(build.best_device())
        # First whatever nobody works on; then what others have not finished.
        for wait in (False, True):
            for i in range(sizes.shards):
                if content or not whole.finished:
                    _make_shard(cfg, clip, train_set, whole, shards[i], sizes, i, wait)
        of = content_key(cfg, train_set)
        whole.make(
            lambda folder: _assemble(folder, sizes, of, shards),
            check="content" if content else "size",
        )
    for shard in shards:  # links to what the cache has now
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


# --- shards ---


def _make_shard(
    cfg: DictConfig,
    clip: FrozenCLIP,
    train_set: ImageDataset,
    whole: Stage,
    shard: Stage,
    sizes: Layout,
    i: int,
    wait: bool,
) -> None:
    def write(folder: Path) -> None:
        found = _found(whole, sizes, i)
        if found is not None and sha256(found) == _checksum(found) and _linked(found, folder):
            log.info("shard %d of %d is whole: kept", i + 1, sizes.shards)
            return
        start = time.monotonic()
        write_shard(
            folder,
            sizes,
            i,
            clip,
            train_set,
            num_workers=cfg.features.num_workers,
            progress=shard.progress,
        )
        rate = sizes.count(i) / (time.monotonic() - start)
        log.info("shard %d of %d written: %.0f images/s", i + 1, sizes.shards, rate)

    try:
        shard.make(write, wait=wait, check="size")
    except Busy:
        log.info("shard %d of %d is another job's", i + 1, sizes.shards)


def _assemble(folder: Path, sizes: Layout, of: dict[str, Any], shards: list[Stage]) -> None:
    """Put finished shards into the cache's folder, and describe them."""
    sealed = []
    for i, shard in enumerate(shards):
        file = sizes.file(i)
        source = shard.path / file
        sealed.append(read_json(shard.path / MARK)["files"][file])
        if not _linked(source, folder):
            source.rename(folder / file)  # a kill before the cache is finished costs this shard
    write_manifest(folder, sizes, of, sealed)
    TokenCache(folder, of)  # each image once


def _found(whole: Stage, sizes: Layout, i: int) -> Path | None:
    """A shard's file of the right size in a damaged cache, set aside or not yet."""
    asides = whole.path.parent.glob(f".{whole.path.name}.damaged-*")
    for folder in (whole.path, *sorted(asides)):
        path = folder / sizes.file(i)
        if path.is_file() and path.stat().st_size == sizes.bytes(i):
            return path
    return None


def _checksum(path: Path) -> str | None:
    """What a shard's SHA-256 should be by the cache's seal, or if that is damaged its manifest."""
    manifest = read_json(path.parent / MANIFEST).get("shards", [])
    said = {about["file"]: about for about in manifest}
    said.update(read_json(path.parent / MARK).get("files", {}))
    return said.get(path.name, {}).get("sha256")


def _linked(file: Path, folder: Path) -> bool:
    """Give a file a second place; False where the file system has no hard links."""
    try:
        (folder / file.name).hardlink_to(file)
    except OSError:
        return False
    return True


# --- places ---


def _is_there(whole: Stage, content: bool) -> bool:
    return whole.path.exists() and find_damage(whole.path, content=content) is None


def _store(cfg: DictConfig) -> Store:
    return Store(cfg.features.cache.folder)


def _shards(cfg: DictConfig, sizes: Layout, train_set: ImageDataset) -> list[Stage]:
    key = {**content_key(cfg, train_set), **_written(cfg), "shard_images": sizes.shard_images}
    store = _store(cfg)
    return [
        store.stage("shards", [*_words(cfg), f"{i:05d}"], {**key, "shard": i}, _about(cfg))
        for i in range(sizes.shards)
    ]


def _written(cfg: DictConfig) -> dict[str, Any]:
    options = cfg.features.cache
    return {"format": VERSION, "dtype": options.dtype, "order_seed": options.order_seed}


def _words(cfg: DictConfig) -> list[str]:
    name = cfg.train_dataset.name
    return [name, SPLIT, cfg.clip.name, cfg.features.cache.dtype]


def _about(cfg: DictConfig) -> dict[str, Any]:
    return {"dataset": cfg.train_dataset.name, "clip": cfg.clip.name}


def _existing(folder: Path) -> Path:
    """The folder, or of what it will be created in the part that is there."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return folder

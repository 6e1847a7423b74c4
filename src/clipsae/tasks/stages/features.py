"""Kinds "features" and "images": the tokens of the training images on disk, or their pixels.
`manifest.json`, `tokens-*.safetensors` or `pixels-*.safetensors` (docs/feature-cache.md).

While a cache is being made, each of its shards is a stage of kind "shards". So several jobs make a
cache together, a killed one loses the shard it was at, and `task=status` shows how far they are.
The finished cache takes the shards over by hard links, which cost nothing.
"""

import logging
import shutil
import time
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from clipsae.clip import FrozenCLIP
from clipsae.data import FeatureDataModule, ImageDataset
from clipsae.data.cache import (
    MANIFEST,
    VERSION,
    Cache,
    Caches,
    ImageLayout,
    Layout,
    TokenLayout,
    write_manifest,
    write_shard,
)
from clipsae.data.cache.loader import check_reading
from clipsae.data.images import RESIZE
from clipsae.data.reader import leaves_out
from clipsae.errors import ConfigError
from clipsae.store import MARK, Stage, Store, find_damage, make_all
from clipsae.store.files import free_bytes, read_json, sha256
from clipsae.tasks import build, precision

log = logging.getLogger(__name__)

SPLIT = "train"
CACHES = ("cache", "image_cache")  # keys of conf/features


def cached(cfg: DictConfig) -> str | None:
    """The key of `cfg.features` that has the options of the cache trained from: "cache" where it
    holds tokens, "image_cache" where it holds decoded images. None: there is no cache."""
    return next((key for key in CACHES if cfg.features.get(key) is not None), None)


def _kind(cfg: DictConfig) -> type[Layout]:
    """What the cache holds."""
    return ImageLayout if cached(cfg) == "image_cache" else TokenLayout


def training_key(cfg: DictConfig) -> dict[str, Any]:
    """What of `cfg.features` decides an SAE's weights."""
    options = build.decisive("features", cfg.features)
    if cached(cfg) == "cache":
        options["cache"] = build.decisive("features", cfg.features.cache)
    return options


def content_key(cfg: DictConfig, train_set: ImageDataset) -> dict[str, Any]:
    """What is in the cache: all that decides it but how it is written."""
    if _kind(cfg) is ImageLayout:
        return {
            "dataset": build.dataset_key(cfg.train_dataset, train_set),
            "split": SPLIT,
            "image_size": train_set.image_size,
            "resize": RESIZE,
        }
    return {
        "clip": build.clip_key(cfg),
        "dataset": cfg.train_dataset.name,
        "fingerprint": train_set.fingerprint,
        "on_bad_image": "skip" if leaves_out(train_set) else "error",
        "split": SPLIT,
        "image_size": train_set.image_size,
    }


def stage(cfg: DictConfig, train_set: ImageDataset, **shard: int) -> Stage:
    """The place of the cache, or while it is made of a shard.

    Args:
        shard: which one (`shard`), and the images of each (`shard_images`).
    """
    options, dataset = cfg.features[cached(cfg)], cfg.train_dataset.name
    key: dict[str, Any] = {**content_key(cfg, train_set), "format": VERSION}
    words, about = [dataset, SPLIT], {"dataset": dataset}
    if _kind(cfg) is ImageLayout:
        kind = "images"
        words.append(f"{train_set.image_size}px")
    else:
        kind = "features"
        key |= {"dtype": options.dtype, "order_seed": options.order_seed}
        words += [cfg.clip.name, options.dtype]
        about["clip"] = cfg.clip.name
    if shard:
        kind = "shards"
        key |= shard
        words.append(f"{shard['shard']:05d}")
    return Store(options.folder).stage(kind, words, key, about)


class _Cache:
    """A cache, its shards and its sizes.

    Raises:
        ConfigError: an invalid option.
    """

    def __init__(self, cfg: DictConfig, clip: FrozenCLIP, train_set: ImageDataset) -> None:
        self.cfg, self.clip, self.train_set = cfg, clip, train_set
        options = build.plain(cfg.features[cached(cfg)])
        self.folder = Path(options.pop("folder"))
        options |= {"images": len(train_set)}
        if _kind(cfg) is TokenLayout:
            options |= {"tokens": clip.positions, "width": clip.width}
        else:
            options |= {"image_size": train_set.image_size}
        self.sizes: Layout = build.user_error(_kind(cfg).of_shards, **options)
        self.stage = stage(cfg, train_set)
        self.shards = [
            stage(cfg, train_set, shard=i, shard_images=self.sizes.shard_images)
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
        Cache(folder, content, kind=_kind(self.cfg))  # each image once


def check(
    cfg: DictConfig, clip: FrozenCLIP, train_set: ImageDataset, *, content: bool = False
) -> None:
    """Say what the disk will need and has; nothing where the cache is there.

    Raises:
        ConfigError: an invalid option, or a disk that is too small.
    """
    if cached(cfg) == "cache":
        build.user_error(check_reading, cfg.features.block_images, cfg.features.buffer_images)
    cache = _Cache(cfg, clip, train_set)
    sizes, folder, name = cache.sizes, cache.folder, cache.stage.path.name
    if cache.is_there(content):
        log.info("using the %s %s", sizes.NAME, cache.stage.path)
        return
    missing = [
        i for i, shard in enumerate(cache.shards) if not shard.finished and not cache.found(i)
    ]
    needed = sum(sizes.bytes(i) for i in missing)
    free = free_bytes(folder)
    if needed > free:
        raise ConfigError(
            f"{sizes} of {name} need {needed / 1e9:,.1f} GB, and {folder} has {free / 1e9:,.1f} GB "
            f"free: make space, set features.{cached(cfg)}.folder to a larger disk, or use "
            "features=online"
        )
    log.info(
        "%s of %s: %.2f GB to write in %d of %d shards; %s has %.1f GB free",
        *(sizes, name, needed / 1e9, len(missing), sizes.shards, folder, free / 1e9),
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
    _make([cache], content)
    return cache.stage.path


def _make(caches: Sequence[_Cache], content: bool = False) -> None:
    """Make those caches of several layers that are missing, in one pass over the images."""
    if missing := [one for one in caches if not one.is_there(content)]:
        for one in missing:
            one.clip.to(build.best_device())
            precision.apply(one.cfg, one.clip)
        log.info("%s", precision.described(missing[0].cfg))
        # First the shards that nobody works on; then what others have not finished.
        for wait in (False, True):
            for i in range(missing[0].sizes.shards):
                _make_shards([o for o in missing if content or not o.stage.finished], i, wait)
        for one in missing:
            one.stage.make(one.assemble, check="content" if content else "size")
    for one in caches:
        for shard in one.shards:  # links to what the cache has now
            shutil.rmtree(shard.path, ignore_errors=True)


def _make_shards(caches: Sequence[_Cache], i: int, wait: bool) -> None:
    """Make a shard of each of several layers, unless other jobs do and we do not wait."""
    by_shard = {one.shards[i].path: one for one in caches}
    number = f"shard {i + 1} of {caches[0].sizes.shards}" if caches else ""

    def write(folders: Mapping[Path, Path]) -> dict[Path, Exception]:
        left = {by_shard[path]: folder for path, folder in folders.items()}
        for one, folder in list(left.items()):
            found = one.found(i)
            if found is not None and sha256(found) == _checksum(found) and _linked(found, folder):
                log.info("%s is complete: kept", number)
                del left[one]
        if not left:
            return {}

        def progress(done: int, total: int) -> None:
            for one in left:
                one.shards[i].progress(done, total)

        first, start = next(iter(left)), time.monotonic()
        write_shard(
            {one.clip.layer: folder for one, folder in left.items()},
            first.sizes,
            i,
            first.clip,
            first.train_set,
            num_workers=first.cfg.features.num_workers,
            progress=progress,
        )
        rate = first.sizes.count(i) / (time.monotonic() - start)
        log.info("%s written: %.0f images/s", number, rate)
        return {}

    shards = [one.shards[i] for one in caches]
    for error in make_all(shards, write, wait=wait, check="size").values():
        raise error


def data_module(
    cfg: DictConfig,
    clip: FrozenCLIP,
    train_set: ImageDataset,
    val_set: ImageDataset | None = None,
    *,
    cache: Cache | Caches | None = None,
    layers: Collection[int] | None = None,
    needs: Collection[str] = (),
) -> FeatureDataModule:
    """What streams tokens to the training.

    Args:
        cache: of `open_cache`; None: tokens are computed from images.
        layers, needs: of the SAEs, see `FeatureDataModule`.

    Raises:
        ConfigError: invalid sizes.
    """
    own = (*CACHES, "max_norm_ratio")
    options = {k: v for k, v in build.plain(cfg.features).items() if k not in own}
    return build.user_error(
        FeatureDataModule,
        clip,
        train_set,
        val_dataset=val_set,
        seed=cfg.seed,
        cache=cache,
        layers=layers,
        target_layer=cfg.model.get("target_layer"),
        needs=needs,
        **options,
    )


def open_cache(cfg: DictConfig, clip: FrozenCLIP, train_set: ImageDataset) -> Cache | None:
    """The cache, made first where it is missing; None for features=online.

    Raises:
        ConfigError: what lies there is not this cache.
    """
    if cached(cfg) is None:
        return None
    folder = make(cfg, clip, train_set)
    return build.user_error(Cache, folder, content_key(cfg, train_set), kind=_kind(cfg))


def open_caches(
    configs: Mapping[int, DictConfig], clip: FrozenCLIP, train_set: ImageDataset
) -> Cache | Caches | None:
    """The same for several layers: of tokens a cache for each.

    Args:
        configs: by layer, counted from the end; they differ in `clip.layer`.
    """
    one = next(iter(configs.values()))
    if len(configs) == 1 or cached(one) != "cache":  # of images there is one for all
        return open_cache(one, clip, train_set)
    _make([_Cache(cfg, clip.at(layer), train_set) for layer, cfg in configs.items()])
    found = {layer: open_cache(cfg, clip.at(layer), train_set) for layer, cfg in configs.items()}
    return build.user_error(Caches, found)


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

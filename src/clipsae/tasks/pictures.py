"""The SAEs that `task=explore` and `task=visualize` show, and their reference images: kind
"pictures" of the store, `pictures.safetensors`, `pictures.json`, `config.yaml`."""

import hashlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from clipsae.clip import FrozenCLIP
from clipsae.data import ImageDataset
from clipsae.errors import ConfigError
from clipsae.progress import Bar
from clipsae.sae import SAE
from clipsae.store import Stage, Store
from clipsae.tasks import build, guidance, precision
from clipsae.tasks.evaluate import bring_in
from clipsae.tasks.stages import evaluation, sae
from clipsae.visualization import collect_references
from clipsae.visualization.collector import SAMPLE, TOP

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Dictionary:
    """An SAE with reference images.

    Attributes:
        cfg: its config.
        trained: its place in the store.
        pictures: that of its reference images.
    """

    cfg: DictConfig
    trained: Stage
    pictures: Stage


def prepare(
    configs: Sequence[DictConfig],
    store: Store,
    check: Callable[[DictConfig, FrozenCLIP, ImageDataset], None],
) -> tuple[FrozenCLIP, ImageDataset, list[Dictionary]]:
    """The CLIP, the images and the SAEs of some configs, with their reference images, which are
    collected where they are missing.

    Args:
        configs: that differ in their model; one, where `task.sae` is an SAE from elsewhere.
        check: refuses what is invalid, before anything slow begins.

    Raises:
        ConfigError: what `check` refuses; an SAE that is not trained yet or cannot be read.
    """
    cfg = configs[0]
    make = None
    if cfg.task.sae:
        cfg, clip, imported, make = bring_in(cfg, store)
        configs = [cfg]
    else:
        for one in configs:
            guidance.resolve(one, store)
        clip = build.build_clip(cfg)
    dataset = build.build_dataset(cfg.dataset, cfg.task.split, clip.image_size)
    if cfg.features.tokens == "cls":
        raise ConfigError(
            "features.tokens=cls: reference images show on which patches a latent is active, and "
            "an SAE of the class token alone has none: choose one of all tokens or of patches"
        )
    if (target := cfg.model.get("target_layer")) is not None:
        raise ConfigError(
            f"model.target_layer={target}: what a latent does is shown where an SAE reads, and a "
            "transcoder writes to another layer: choose an SAE that is none"
        )
    check(cfg, clip, dataset)
    if make is not None:
        imported.make(make)
        trained = [imported]
    else:
        trained = [finished_sae(one, store, clip) for one in configs]
    found = [
        Dictionary(one, place, stage(one, store, place, dataset))
        for one, place in zip(configs, trained, strict=True)
    ]
    # Another job may make some in the meantime: then what is missing is asked for again.
    while missing := {one.pictures.path: one for one in found if not one.pictures.finished}:
        some = [missing[path] for path in sorted(missing)]
        tokens = precision.of_clip(some[0].cfg)
        _make([o for o in some if precision.of_clip(o.cfg) == tokens], [], clip, dataset)
    return clip, dataset, found


def check_models(cfg: DictConfig) -> None:
    """Refuse SAEs that are asked for in two ways.

    Raises:
        ConfigError: `task.sae` and `task.models`.
    """
    if cfg.task.sae and cfg.task.models:
        raise ConfigError("task.sae and task.models: expected one of them, or neither")


def configs_of_models(cfg: DictConfig) -> list[DictConfig]:
    """One config for each of `task.models`, each with its own defaults and recipe, and the
    overrides of the command line; `cfg` alone where there are none.

    Raises:
        ConfigError: a model that does not exist, or an override that does not fit it.
    """
    if not cfg.task.models:
        return [cfg]
    overrides = [
        override
        for override in HydraConfig.get().overrides.task
        if not override.startswith(("model=", "task.models="))
    ]
    found = []
    for model in cfg.task.models:
        try:
            config = hydra.compose("config", overrides=[*overrides, f"model={model}"])
        except (HydraException, OmegaConfBaseException) as error:
            reason = str(error).splitlines()[0]
            raise ConfigError(f"task.models has {model!r}: {reason}") from error
        # What depends on where the job runs has been resolved in `cfg`.
        config.paths = OmegaConf.create(build.plain(cfg.paths))
        found.append(config)
    return found


def folder_name(saes: list[str]) -> str:
    """A folder for what shows these SAEs (names in the store)."""
    if len(saes) == 1:
        return saes[0]
    words = "+".join(name.split("-")[0] for name in saes)
    return f"{words}-{hashlib.sha256(' '.join(saes).encode()).hexdigest()[:8]}"


def stage(cfg: DictConfig, store: Store, sae_stage: Stage, dataset: ImageDataset) -> Stage:
    """The place of the pictures: the SAE and the images are in the key."""
    key = {
        "sae": sae_stage.path.name,
        "dataset": build.dataset_key(cfg.dataset, dataset),
        "split": cfg.task.split,
        "image_encoder": evaluation.encoder_name(cfg, dataset),
        "limit_images": build.limit_images(cfg),
        "top": TOP,
        "sample": SAMPLE,
    }
    name = [cfg.model.name, cfg.clip.name, cfg.dataset.name, cfg.task.split]
    return store.stage("pictures", [*name, f"s{cfg.seed}"], key)


def split_name(dataset: ImageDataset, split: str) -> str:
    """A dataset's split in words: there may be one for both, with the same images."""
    if getattr(dataset, "one_split", False):
        return "all images, those of the training too"
    return f"{split} split"


def names(dataset: ImageDataset) -> Sequence[str] | None:
    """The images' files, relative to the dataset's root; None where they are no files."""
    return getattr(dataset, "files", None)


def name_of_file(path: Path) -> str:
    """What is written about an image file is called: two may have the same name in different
    folders."""
    mark = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:4]
    return f"{path.stem}-{mark}"


def finished_sae(cfg: DictConfig, store: Store, clip: FrozenCLIP) -> Stage:
    """The trained SAE of a config.

    Raises:
        ConfigError: it is not trained yet.
    """
    train_set = build.build_dataset(cfg.train_dataset, "train", clip.image_size)
    sae.resolve_latents(cfg, clip, train_set)
    trained = precision.resolve(cfg, lambda: sae.stage(cfg, store, train_set))
    if not trained.finished:
        of_this_task = ("task=", "task.", "model=")
        kept = [f"model={cfg.model.name}"]
        for override in HydraConfig.get().overrides.task:
            if not override.lstrip("+~").startswith(of_this_task):
                kept.append(override)
        raise ConfigError(
            f"the {cfg.model.name} SAE of this config is not trained yet ({trained.path}): "
            f"run `python run.py {' '.join(kept)}` first"
        )
    return trained


def why_few(cfg: DictConfig) -> str:
    """Why `build.limit_images` is not all images."""
    if cfg.evaluation.limit_images is not None:
        return f"evaluation.limit_images={cfg.evaluation.limit_images}"
    return "the CLIP has random weights; evaluation.limit_images= takes more"


def _make(
    missing: list[Dictionary], folders: list[Path], clip: FrozenCLIP, dataset: ImageDataset
) -> None:
    """Make the pictures of several SAEs in one pass, in the folders of all: leases are nested."""
    if len(folders) == len(missing):
        _collect(missing, folders, clip, dataset)
    else:
        missing[len(folders)].pictures.make(
            lambda folder: _make(missing, [*folders, folder], clip, dataset)
        )


def _collect(
    missing: list[Dictionary], folders: list[Path], clip: FrozenCLIP, dataset: ImageDataset
) -> None:
    cfg = missing[0].cfg
    device = build.best_device()
    precision.apply(cfg, clip)
    log.info("%s", precision.described(cfg))
    stages = {one.pictures.path.name: one.pictures for one in missing}
    limit = build.limit_images(cfg)
    few = ""
    if limit is not None and limit < len(dataset):
        few = f" from {limit:,} of {len(dataset):,} images ({why_few(cfg)})"
    log.info("collecting reference images%s: %s", few, ", ".join(stages))

    def report(done: int, total: int) -> None:
        for one in stages.values():
            one.progress(done, total)

    with Bar("reference images", report) as progress:
        found = build.user_error(
            collect_references,
            clip.to(device),
            {name: SAE.load(one.trained.path) for name, one in zip(stages, missing, strict=True)},
            dataset,
            name=cfg.dataset.name,
            split=cfg.task.split,
            encoder=evaluation.encoder_name(cfg, dataset),
            batch_size=cfg.evaluation.batch_size,
            num_workers=cfg.features.num_workers,
            device=device,
            limit_images=limit,
            scratch={name: one.scratch for name, one in stages.items()},
            progress=progress,
        )
    for references, folder, one in zip(found.values(), folders, missing, strict=True):
        references.save(folder)
        build.save_config(one.cfg, folder)

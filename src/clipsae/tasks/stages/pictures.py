"""Kind "pictures": the reference images and statistics of an SAE's latents on a dataset.
`pictures.safetensors`, `pictures.json`, `config.yaml`."""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from clipsae.clip import FrozenCLIP
from clipsae.data import ImageDataset
from clipsae.errors import ConfigError
from clipsae.progress import Bar
from clipsae.sae import SAE
from clipsae.store import Stage, Store
from clipsae.tasks import build
from clipsae.tasks.stages import evaluation, sae
from clipsae.visualization.collect import collect_references
from clipsae.visualization.collector import TOP

log = logging.getLogger(__name__)


def stage(
    cfg: DictConfig, store: Store, sae_stage: Stage, dataset: ImageDataset, split: str
) -> Stage:
    """The place of the pictures: the SAE and the images are in the key."""
    key = {
        "sae": sae_stage.path.name,
        "dataset": build.dataset_key(cfg.dataset, dataset),
        "split": split,
        "image_encoder": evaluation.encoder_name(cfg, dataset),
        "limit_images": build.limit_images(cfg),
        "top": TOP,
    }
    name = [cfg.model.name, cfg.clip.name, cfg.dataset.name, split]
    return store.stage("pictures", [*name, f"s{cfg.seed}"], key)


def split_name(dataset: ImageDataset, split: str) -> str:
    """What a dataset's split is, in words: there may be one for both, with the same images."""
    if getattr(dataset, "one_split", False):
        return "all images, those of the training too"
    return f"{split} split"


def names(dataset: ImageDataset) -> Sequence[str] | None:
    """The images' files, relative to the dataset's root; None where they are no files."""
    return getattr(dataset, "files", None)


def finished_sae(cfg: DictConfig, store: Store, clip: FrozenCLIP) -> Stage:
    """The trained SAE of a config.

    Raises:
        ConfigError: it is not trained yet.
    """
    train_set = build.build_dataset(cfg.train_dataset, "train", clip.image_size)
    trained = sae.stage(cfg, store, train_set)
    if not trained.finished:
        kept = [f"model={cfg.model.name}"]
        kept += [o for o in HydraConfig.get().overrides.task if not _of_this_task(o)]
        raise ConfigError(
            f"{trained.path} is not there, the {cfg.model.name} SAE of this config has yet to be "
            f"trained: run `python run.py {' '.join(kept)}` first"
        )
    return trained


def _of_this_task(override: str) -> bool:
    return override.lstrip("+~").startswith(("task=", "task.", "model="))


def make_all(
    configs: Sequence[DictConfig],
    clip: FrozenCLIP,
    trained: Sequence[Stage],
    stages: Sequence[Stage],
    dataset: ImageDataset,
    split: str,
) -> None:
    """Make what is missing of several SAEs' pictures, in one pass over the images."""
    missing = {
        stage.path: (stage, cfg, of)
        for cfg, of, stage in zip(configs, trained, stages, strict=True)
        if not stage.finished
    }
    while missing:
        work = [missing[path] for path in sorted(missing)]
        _together(
            [stage for stage, _, _ in work],
            # Bound now: what is missing may be less the next time round.
            lambda folders, work=work: _collect(work, clip, dataset, split, folders),
        )
        missing = {path: of for path, of in missing.items() if not of[0].finished}


def _together(stages: Sequence[Stage], build_all: Callable[[list[Path]], None]) -> None:
    """`make` several stages at once: `build_all` gets the folders of all of them.

    Where another job finishes one in the meantime, nothing is built: ask again.
    """

    def nest(rest: Sequence[Stage], folders: list[Path]) -> None:
        if not rest:
            build_all(folders)
            return
        rest[0].make(lambda folder: nest(rest[1:], [*folders, folder]))

    nest(stages, [])


def why_few(cfg: DictConfig) -> str:
    """Why `build.limit_images` looks at some of the images only."""
    if cfg.evaluation.limit_images is not None:
        return f"evaluation.limit_images={cfg.evaluation.limit_images}"
    return "the CLIP has random weights; evaluation.limit_images= takes more"


def _collect(
    work: list[tuple[Stage, DictConfig, Stage]],
    clip: FrozenCLIP,
    dataset: ImageDataset,
    split: str,
    folders: list[Path],
) -> None:
    cfg = work[0][1]
    device = build.best_device()
    stages = [stage.path.name for stage, _, _ in work]
    limit = build.limit_images(cfg)
    few = ""
    if limit is not None and limit < len(dataset):
        few = f" from {limit:,} of {len(dataset):,} images ({why_few(cfg)})"
    log.info("collecting reference images%s: %s", few, ", ".join(stages))
    saes = {
        name: SAE.load(trained.path).to(device)
        for name, (_, _, trained) in zip(stages, work, strict=True)
    }

    def report(done: int, total: int) -> None:
        for stage, _, _ in work:
            stage.progress(done, total)

    with Bar("reference images", report) as progress:
        found = build.user_error(
            collect_references,
            clip.to(device),
            saes,
            dataset,
            name=cfg.dataset.name,
            split=split,
            encoder=evaluation.encoder_name(cfg, dataset),
            batch_size=cfg.evaluation.batch_size,
            num_workers=cfg.features.num_workers,
            device=device,
            limit_images=limit,
            scratch={name: stage.scratch for name, (stage, _, _) in zip(stages, work, strict=True)},
            progress=progress,
        )
    for name, folder, (_, of, _) in zip(stages, folders, work, strict=True):
        found[name].save(folder)
        build.save_config(of, folder)

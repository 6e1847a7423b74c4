"""Kind "sae": a trained SAE. `sae.safetensors`, `sae.json`, `training.json`, `config.yaml`."""

import logging
from pathlib import Path

import lightning
import torch
from lightning.pytorch.loggers import Logger
from omegaconf import DictConfig

from clipsae.clip import FrozenCLIP
from clipsae.data import FeatureDataModule, ImageDataset
from clipsae.store import Stage, Store, whole_checkpoint, write_json
from clipsae.tasks import build, plugins
from clipsae.training.callbacks import (
    ReportProgress,
    ResumeCheckpoint,
    StepProgress,
    TokenRate,
)
from clipsae.training.module import SAEModule
from clipsae.training.schedule import warmup_then

log = logging.getLogger(__name__)


def stage(cfg: DictConfig, store: Store, train_set: ImageDataset) -> Stage:
    """The place of the trained SAE: everything that decides its weights is in the key."""
    trainer = cfg.trainer
    key = {
        "clip": build.clip_key(cfg),
        "train_dataset": build.dataset_key(build.train_dataset_node(cfg), train_set),
        "sae": build.sae_options(cfg),
        "training": {
            **build.training_options(cfg),
            "max_steps": trainer.max_steps,
            "precision": str(trainer.precision),
            "gradient_clip_val": trainer.gradient_clip_val,
            "batch_size": cfg.features.batch_size,
            "shuffle_tokens": cfg.features.shuffle_tokens,
            "batches_a_step": trainer.accumulate_grad_batches
            * int(trainer.num_nodes)
            * (trainer.devices if isinstance(trainer.devices, int) else len(trainer.devices)),
            "seed": cfg.seed,
        },
    }
    if plugged := plugins.digests(cfg):
        key["plugins"] = plugged
    name = [cfg.model.name, cfg.clip.name, build.train_dataset_node(cfg).name]
    words = [*name, f"m{cfg.model.latents}", f"s{cfg.seed}"]
    about = {**build.cell(cfg), "dataset": name[2]}
    return store.stage("sae", words, key, about)


def check(cfg: DictConfig, clip: FrozenCLIP, train_set: ImageDataset) -> None:
    """Refuse now, at no cost, what would be refused in the midst of the training.

    Raises:
        ConfigError: an option of the SAE or its training that cannot be.
    """
    with torch.device("meta"):
        sae = build.build_sae(cfg, clip.width)
    options = build.training_options(cfg)
    build.user_error(SAEModule, sae, **options)
    build.user_error(warmup_then, options["decay"], options["warmup_steps"], cfg.trainer.max_steps)
    build.user_error(FeatureDataModule, clip, train_set, **build.plain(cfg.features))


def make(
    cfg: DictConfig,
    clip: FrozenCLIP,
    train_set: ImageDataset,
    logger: Logger | None,
    stage: Stage,
    folder: Path,
) -> None:
    """Train an SAE and write it into `folder`, continuing from the stage's checkpoint if any."""
    lightning.seed_everything(cfg.seed, workers=True, verbose=False)
    module = SAEModule(build.build_sae(cfg, clip.width), **build.training_options(cfg))
    held_out = build.build_dataset(build.train_dataset_node(cfg), "test", clip.image_size)
    data = FeatureDataModule(
        clip, train_set, val_dataset=held_out, seed=cfg.seed, **build.plain(cfg.features)
    )
    place = stage.scratch / "last.ckpt"
    checkpoint = whole_checkpoint(place)
    callbacks = [
        ResumeCheckpoint(
            place,
            every_n_steps=cfg.callbacks.checkpoint_every_n_steps,
            every_n_seconds=cfg.callbacks.checkpoint_every_n_seconds,
        ),
        ReportProgress(stage.progress),
        TokenRate(),
    ]
    if cfg.callbacks.progress_bar:
        callbacks.append(StepProgress())
    trainer = build.call_target(
        cfg.trainer,
        logger=logger if logger is not None else False,
        callbacks=callbacks,
        default_root_dir=folder,
        enable_model_summary=False,
        enable_progress_bar=False,
        check_val_every_n_epoch=None,
    )
    continues = "training" if checkpoint is None else "continuing the training of"
    log.info("%s %s", continues, stage.path.name)
    trainer.fit(
        module,
        datamodule=data,
        ckpt_path=checkpoint,
        weights_only=True,
    )
    module.sae.save(folder)
    build.save_config(cfg, folder)
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    write_json(folder / "training.json", {"steps": trainer.global_step, **metrics})

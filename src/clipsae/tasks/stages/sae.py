"""Kind "sae": a trained SAE. `sae.safetensors`, `sae.json`, `training.json`, `config.yaml`."""

import logging
import os
from collections.abc import Sequence
from pathlib import Path

import lightning
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import Logger
from lightning.pytorch.plugins.environments import SLURMEnvironment
from omegaconf import DictConfig

from clipsae.clip import FrozenCLIP
from clipsae.data import ImageDataset
from clipsae.errors import ConfigError
from clipsae.store import Stage, Store, whole_checkpoint, write_json
from clipsae.store.files import checkpoint_step
from clipsae.tasks import build, plugins, together
from clipsae.tasks.stages import features
from clipsae.training.callbacks import ReportProgress, ResumeCheckpoint, StepProgress, TokenRate
from clipsae.training.module import SAEModule
from clipsae.training.schedule import warmup_then
from clipsae.training.signals import CheckpointOnSignal

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
            **features.training_key(cfg),
        },
    }
    if plugged := plugins.digests(cfg):
        key["plugins"] = plugged
    name = [cfg.model.name, cfg.clip.name, build.train_dataset_node(cfg).name]
    about = {**build.cell(cfg), "dataset": name[2]}
    return store.stage("sae", [*name, f"m{cfg.model.latents}", f"s{cfg.seed}"], key, about)


def check(cfg: DictConfig, clip: FrozenCLIP, train_set: ImageDataset) -> None:
    """Refuse now, at no cost, what would be refused in the midst of the training.

    Raises:
        ConfigError: an option of the SAE or its training that cannot be.
    """
    check_devices(cfg)
    with torch.device("meta"):
        sae = build.build_sae(cfg, clip.width)
    options = build.training_options(cfg)
    build.user_error(SAEModule, sae, **options)
    build.user_error(warmup_then, options["decay"], options["warmup_steps"], cfg.trainer.max_steps)
    features.data_module(cfg, clip, train_set)
    if features.cached(cfg) and not stage(cfg, Store(cfg.paths.output_dir), train_set).finished:
        features.check(cfg, clip, train_set)


def check_devices(cfg: DictConfig) -> None:
    """Refuse devices that cannot be counted, and those whose processes cannot be had.

    Raises:
        ConfigError: such devices.
    """
    devices = cfg.trainer.devices
    if isinstance(devices, str) or devices == -1:
        raise ConfigError(
            f"trainer.devices={devices}: expected a number or a list, since the images of a step, "
            "and so the SAE, depend on how many there are"
        )
    several = devices > 1 if isinstance(devices, int) else len(devices) > 1
    if several and together.is_shared():
        raise ConfigError(
            f"trainer.devices={devices}: together=true trains on one device; leave out one of them"
        )
    started = SLURMEnvironment.detect() or "LOCAL_RANK" in os.environ
    if several and HydraConfig.get().mode == RunMode.MULTIRUN and not started:
        raise ConfigError(
            f"trainer.devices={devices} in a sweep on this machine: Lightning would start the "
            "whole sweep once a device; run one job at a time, or use hydra/launcher=slurm"
        )


def make(
    cfg: DictConfig,
    clip: FrozenCLIP,
    train_set: ImageDataset,
    logger: Logger | None,
    stage: Stage,
    folder: Path,
    watch: Sequence[Callback] = (),
) -> None:
    """Train an SAE and write it into `folder`, continuing from the stage's checkpoint if any.

    Args:
        watch: callbacks that look at the training and leave it as it is.
    """
    lightning.seed_everything(cfg.seed, workers=True, verbose=False)
    module = SAEModule(build.build_sae(cfg, clip.width), **build.training_options(cfg))
    held_out = build.build_dataset(build.train_dataset_node(cfg), "test", clip.image_size)
    cache = features.open_cache(cfg, clip, train_set)
    data = features.data_module(cfg, clip, train_set, held_out, cache=cache)
    checkpoint = stage.scratch / "last.ckpt"
    resume = ResumeCheckpoint(
        checkpoint,
        every_n_steps=cfg.callbacks.checkpoint_every_n_steps,
        every_n_seconds=cfg.callbacks.checkpoint_every_n_seconds,
    )
    callbacks = [resume, TokenRate(), ReportProgress(stage.progress), *watch]
    if together.is_shared():  # which answers signals, too
        data.source = together.source(
            lambda: features.data_module(cfg, clip, train_set, cache=cache),
            save=lambda: resume.save_between(trainer),
        )
    else:
        callbacks.append(CheckpointOnSignal(resume.save))
    if cfg.callbacks.progress_bar:
        k = cfg.model.get("k")
        callbacks.append(StepProgress(cfg.model.name + (f" k={k}" if k else "")))
    trainer = build.call_target(
        cfg.trainer,
        logger=logger if logger is not None else False,
        callbacks=callbacks,
        # Lightning's own requeuing and submitit's would meet.
        plugins=[SLURMEnvironment(auto_requeue=False)] if SLURMEnvironment.detect() else None,
        default_root_dir=folder,
        enable_model_summary=False,
        enable_progress_bar=False,
        check_val_every_n_epoch=None,
    )
    begun = whole_checkpoint(checkpoint)
    if begun:
        at = checkpoint_step(stage.scratch)
        log.info("continuing the training of %s from step %s", stage.path.name, at)
    else:
        log.info("training %s", stage.path.name)
    try:
        trainer.fit(module, datamodule=data, ckpt_path=begun, weights_only=True)
    except FloatingPointError as error:
        kept = checkpoint_step(stage.scratch)
        raise ConfigError(
            f"{error}: the last good checkpoint "
            + ("is none" if kept is None else f"is that of step {kept:,}, kept in {stage.home}")
            + "; lower model.learning_rate, or set trainer.gradient_clip_val=1"
        ) from error
    if torch.distributed.is_initialized():  # or the evaluation's metrics wait for other ranks
        torch.distributed.destroy_process_group()
    if not trainer.is_global_zero:
        return
    module.sae.save(folder)
    build.save_config(cfg, folder)
    write_json(folder / "training.json", {"steps": trainer.global_step, **module.numbers()})

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
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from omegaconf import DictConfig, OmegaConf

from clipsae.clip import FrozenCLIP
from clipsae.data import ImageDataset
from clipsae.errors import ConfigError
from clipsae.store import Stage, Store, whole_checkpoint, write_json
from clipsae.store.files import checkpoint_step
from clipsae.tasks import build, plugins, together
from clipsae.tasks.options import TRAINER
from clipsae.tasks.stages import features
from clipsae.training.callbacks import (
    BusyCores,
    ReportProgress,
    ResumeCheckpoint,
    StepProgress,
    TokenRate,
)
from clipsae.training.module import SAEModule
from clipsae.training.schedule import warmup_then
from clipsae.training.signals import CheckpointOnSignal

log = logging.getLogger(__name__)

TRAINER_OPTIONS = {
    "enable_model_summary": False,
    "enable_progress_bar": False,
    "check_val_every_n_epoch": None,
}


# Keys of Lightning's Trainer that can end a training before its last step.
ENDING = ("max_time", "limit_train_batches", "overfit_batches")


def stage(cfg: DictConfig, store: Store, train_set: ImageDataset) -> Stage:
    """The place of the trained SAE: everything that decides its weights is in the key."""
    trainer = build.plain(cfg.trainer)
    devices = trainer["devices"] if isinstance(trainer["devices"], int) else len(trainer["devices"])
    key = {
        "clip": build.clip_key(cfg),
        "train_dataset": build.dataset_key(cfg.train_dataset, train_set),
        "sae": build.sae_options(cfg),
        "training": {
            **build.training_options(cfg),
            "trainer": build.decisive("trainer", trainer),
            "batches_a_step": trainer["accumulate_grad_batches"] * trainer["num_nodes"] * devices,
            "features": features.training_key(cfg),
            "seed": cfg.seed,
        },
    }
    if plugged := plugins.digests(cfg):
        key["plugins"] = plugged
    name = [cfg.model.name, cfg.clip.name, cfg.train_dataset.name]
    about = {**build.cell(cfg), "dataset": name[2]}
    return store.stage("sae", [*name, f"m{cfg.model.latents}", f"s{cfg.seed}"], key, about)


def check_options(cfg: DictConfig) -> None:
    """Refuse what the config alone shows cannot be trained.

    Raises:
        ConfigError: an invalid option of the SAE, its training or Lightning's Trainer.
    """
    check_devices(cfg)
    options = build.training_options(cfg)
    if cfg.model.get("k") == "auto":  # a number by then
        cfg = OmegaConf.merge(cfg, {"model": {"k": 1}})
    with torch.device("meta"):
        sae = build.build_sae(cfg, d=64)  # any width
        build.user_error(SAEModule, sae, **options)
    build.user_error(warmup_then, options["decay"], options["warmup_steps"], cfg.trainer.max_steps)
    try:
        build.call_target(cfg.trainer, logger=False, **TRAINER_OPTIONS, plugins=_plugins())
    except (MisconfigurationException, ValueError, TypeError, RuntimeError) as error:
        own = [name for name in cfg.trainer if name not in TRAINER]
        names = ("accelerator", "devices", "strategy", "precision", *own)
        given = ", ".join(f"trainer.{name}={cfg.trainer[name]}" for name in names)
        said = str(error).strip().splitlines()[0]
        hint = ""
        if cfg.trainer.accelerator != "auto":
            hint = " (trainer.accelerator=auto takes what is there)"
        raise ConfigError(f"Lightning's Trainer refuses {given}: {said}{hint}") from error


def check(cfg: DictConfig, clip: FrozenCLIP, train_set: ImageDataset) -> None:
    """Refuse now, at no cost, what would be refused in the midst of the training.

    Raises:
        ConfigError: an option of the SAE or its features that is invalid with this CLIP and these
            images.
    """
    with torch.device("meta"):
        build.build_sae(cfg, clip.width)
    features.data_module(cfg, clip, train_set)
    if features.cached(cfg) and not stage(cfg, Store(cfg.paths.output_dir), train_set).finished:
        features.check(cfg, clip, train_set)


def check_devices(cfg: DictConfig) -> None:
    """Refuse devices that cannot be counted, or whose processes cannot be started.

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
    held_out: ImageDataset,
    logger: Logger | None,
    stage: Stage,
    folder: Path,
    watch: Sequence[Callback] = (),
) -> None:
    """Train an SAE and write it into `folder`, continuing from the stage's checkpoint if any.

    Args:
        held_out: images for validation.
        watch: callbacks that observe the training.
    """
    lightning.seed_everything(cfg.seed, workers=True, verbose=False)
    module = SAEModule(build.build_sae(cfg, clip.width), **build.training_options(cfg))
    cache = features.open_cache(cfg, clip, train_set)
    data = features.data_module(cfg, clip, train_set, held_out, cache=cache)
    checkpoint = stage.scratch / "last.ckpt"
    resume = ResumeCheckpoint(
        checkpoint,
        every_n_steps=cfg.callbacks.checkpoint_every_n_steps,
        every_n_seconds=cfg.callbacks.checkpoint_every_n_seconds,
    )
    callbacks = [resume, TokenRate(), BusyCores(), ReportProgress(stage.progress), *watch]
    if together.is_shared():  # which answers signals, too
        data.source = together.source(
            lambda: features.data_module(cfg, clip, train_set, cache=cache),
            save=lambda: resume.save_between(trainer),
        )
    else:
        callbacks.append(CheckpointOnSignal(resume))
    if cfg.callbacks.progress_bar:
        k = cfg.model.get("k")
        callbacks.append(StepProgress(cfg.model.name + (f" k={k}" if k else "")))
    trainer = build.call_target(
        cfg.trainer,
        logger=logger if logger is not None else False,
        callbacks=callbacks,
        plugins=_plugins(),
        default_root_dir=folder,
        **TRAINER_OPTIONS,
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
            + ("is none" if kept is None else f"is that of step {kept:,}, kept in {stage.partial}")
            + "; lower optimizer.learning_rate, or set trainer.gradient_clip_val=1"
        ) from error
    if trainer.global_step < trainer.max_steps:
        kept = checkpoint_step(stage.scratch)
        raise ConfigError(
            f"{stage.path.name} is not finished: Lightning ended its training after "
            f"{trainer.global_step:,} of {trainer.max_steps:,} steps{_why_ended(cfg)}"
            + ("" if kept is None else f"; the same command without it goes on from step {kept:,}")
        )
    if torch.distributed.is_initialized():  # or the evaluation's metrics wait for other ranks
        torch.distributed.destroy_process_group()
    if not trainer.is_global_zero:
        return
    module.sae.save(folder)
    build.save_config(cfg, folder)
    write_json(folder / "training.json", {"steps": trainer.global_step, **module.numbers()})


def _plugins() -> list[SLURMEnvironment] | None:
    """Lightning's own requeuing and submitit's would meet."""
    return [SLURMEnvironment(auto_requeue=False)] if SLURMEnvironment.detect() else None


def _why_ended(cfg: DictConfig) -> str:
    """The keys that may have ended a training early."""
    found = [f"trainer.{name}={v}" for name, v in cfg.trainer.items() if name in ENDING]
    return f" ({', '.join(found)})" if found else ""

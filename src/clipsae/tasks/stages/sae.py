"""Kind "sae": a trained SAE, or one that is fitted (`model.fit`). `sae.safetensors`, `sae.json`,
`training.json`, `config.yaml`."""

import logging
import os
from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import Logger
from lightning.pytorch.plugins.environments import SLURMEnvironment
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from omegaconf import DictConfig, OmegaConf

from clipsae.clip import FrozenCLIP
from clipsae.clip.text import text_classifier
from clipsae.data import FeatureDataModule, ImageDataset
from clipsae.data.scenes.grammar import KINDS
from clipsae.errors import ConfigError
from clipsae.evaluation.truth import IMAGE_ATTRIBUTES, has_truth
from clipsae.progress import Bar
from clipsae.sae import SAE
from clipsae.store import Stage, Store, write_json
from clipsae.store.files import checkpoint_step
from clipsae.tasks import build, guidance, plugins, precision
from clipsae.tasks.options import FITS, TRAINER
from clipsae.tasks.stages import classifier, features
from clipsae.training import baselines
from clipsae.training.callbacks import BusyCores, Checkpoints, StepProgress, TokenRate
from clipsae.training.module import SAEGroup, SAEModule

log = logging.getLogger(__name__)

TRAINER_OPTIONS = {
    "enable_model_summary": False,
    "enable_progress_bar": False,
    "check_val_every_n_epoch": None,
}
# Keys of Lightning's Trainer in which SAEs that train on the same tokens may differ.
MEMBER_OPTIONS = (
    *("max_steps", "accumulate_grad_batches"),
    *("gradient_clip_val", "gradient_clip_algorithm"),
)
# Keys of Lightning's Trainer that can end a training before its last step.
ENDING = ("max_time", "limit_train_batches", "overfit_batches")


def stage(cfg: DictConfig, store: Store, train_set: ImageDataset) -> Stage:
    """The place of the trained SAE: everything that decides its weights is in the key."""
    fit = cfg.model.get("fit")
    name = [cfg.model.name, cfg.clip.name, cfg.train_dataset.name, f"m{cfg.model.latents}"]
    key = {
        "clip": build.clip_key(cfg),
        "train_dataset": build.dataset_key(cfg.train_dataset, train_set),
        "sae": build.sae_options(cfg),
        "training": {"features": features.training_key(cfg), "seed": cfg.seed},
    }
    if fit is None:
        key["training"] |= _training_key(cfg)
    else:
        key["sae"]["fit"] = fit
        key["training"]["initial_images"] = cfg.model.initial_images
        if fit == "text":
            key["sae"]["renormalize_text"] = cfg.evaluation.renormalize_text
        if FITS[fit]:  # M follows from the rest, and is not known before the CLIP is
            del name[-1], key["sae"]["latents"]
    if plugged := plugins.digests(cfg, measuring=False):
        key["plugins"] = plugged
    about = {**build.cell(cfg), "dataset": name[2]}
    return store.stage("sae", [*name, f"s{cfg.seed}"], key, about)


def _training_key(cfg: DictConfig) -> dict[str, Any]:
    """What of a training's options decides its SAE."""
    trainer = build.plain(cfg.trainer)
    devices = trainer["devices"] if isinstance(trainer["devices"], int) else len(trainer["devices"])
    return {
        **build.training_options(cfg),
        "trainer": {
            **build.decisive("trainer", trainer),
            "precision": precision.of_training(cfg),
        },
        "batches_a_step": trainer["accumulate_grad_batches"] * trainer["num_nodes"] * devices,
    }


def resolve_latents(cfg: DictConfig, clip: FrozenCLIP, train_set: ImageDataset) -> None:
    """Replace `model.latents=null` of a fitted SAE by its number, in place; any other is left."""
    if cfg.model.latents is None:
        words = [word for names, _ in _texts(cfg, train_set) for word in names]
        cfg.model.latents = len(words) if cfg.model.fit == "text" else 2 * clip.width


def check_options(cfg: DictConfig) -> None:
    """Refuse what the config alone shows cannot be trained.

    Raises:
        ConfigError: an invalid option of the SAE, its training or Lightning's Trainer.
    """
    check_devices(cfg)
    if cfg.model.get("fit") is not None:
        return
    options = build.training_options(cfg)
    unknown = dict.fromkeys(guidance.unresolved(cfg), 1)  # numbers by then
    cfg = OmegaConf.merge(cfg, {"model": unknown})
    mixed = cfg.features.get("shuffle_buffer_images")
    if mixed and cfg.model.get("position_mean"):
        raise ConfigError(
            f"features.shuffle_buffer_images={mixed}: tokens that are mixed have no position, and "
            "model.position_mean=true needs it: leave out one of them"
        )
    if (ratio := cfg.features.max_norm_ratio) is not None and cfg.clip.get("hook") == "towers":
        raise ConfigError(
            f"features.max_norm_ratio={ratio}: at clip.hook=towers all tokens have norm 1: set it "
            "to null"
        )
    if cfg.features.batch_size == 1 and cfg.model.get("monosemanticity"):
        raise ConfigError(
            f"model.monosemanticity={cfg.model.monosemanticity} compares the images of a step: set "
            "features.batch_size to 2 at least"
        )
    with torch.device("meta"):
        sae = build.build_sae(cfg, d=64)  # any width
        try:
            SAEModule(sae, **options, max_steps=cfg.trainer.max_steps)
        except ValueError as error:  # which begins with an option's name
            group = "optimizer." if str(error).partition("=")[0] in cfg.optimizer else ""
            raise ConfigError(f"{group}{error}") from error
    try:
        build.call_target(cfg.trainer, logger=False, **TRAINER_OPTIONS, plugins=_plugins())
    except (MisconfigurationException, ValueError, TypeError, RuntimeError) as error:
        own = [name for name in cfg.trainer if name not in TRAINER]
        names = ("accelerator", "devices", "strategy", *own)
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
        needs = build.build_sae(cfg, clip.width).needs
    check_target(cfg, clip)
    check_tokens(cfg, needs)
    if cfg.model.get("fit") == "text":
        clip.require_text()
        if clip.direct(torch.eye(clip.width)) is None:
            raise ConfigError(
                f"model.fit=text: the embedding of clip.name={clip.name} is no linear map of a "
                "normed token, so texts point to no direction of its tokens: choose another fit"
            )
    features.data_module(cfg, clip, train_set, needs=needs)
    if features.cached(cfg) and not stage(cfg, Store(cfg.paths.output_dir), train_set).finished:
        features.check(cfg, clip, train_set)


def check_target(cfg: DictConfig, clip: FrozenCLIP) -> None:
    """Refuse a layer that a transcoder cannot write to.

    Raises:
        ConfigError: one that the CLIP does not have, or that is read.
    """
    if (target := cfg.model.get("target_layer")) is None:
        return
    layer = clip.at(target, "model.target_layer").layer
    clip.check_layers([clip.layer, layer])
    if layer == clip.layer:
        raise ConfigError(
            f"model.target_layer={target} is the layer that is read: choose another one or "
            "another clip.layer"
        )


def check_tokens(cfg: DictConfig, needs: Collection[str]) -> None:
    """Refuse what cannot be with the tokens that are trained on.

    Args:
        needs: of the SAE.

    Raises:
        ConfigError: as it says.
    """
    ratio, callbacks = cfg.features.max_norm_ratio, cfg.callbacks
    if ratio is not None and cfg.model.get("fit") is not None:
        raise ConfigError(
            f"features.max_norm_ratio={ratio}: model.fit={cfg.model.fit} is of all tokens: set it "
            "to null"
        )
    hook = cfg.clip.get("hook", "resid")
    if (
        hook in ("attn_out", "mlp_out")
        and "embeddings" in needs
        and features.cached(cfg) == "cache"
    ):
        raise ConfigError(
            f"features=cached with clip.hook={hook}: a loss term of this SAE needs the images' "
            "embeddings, which do not follow from such tokens alone: use features=images or online"
        )
    if ratio is not None and _training_key(cfg)["batches_a_step"] != (
        cfg.trainer.accumulate_grad_batches
    ):
        raise ConfigError(
            f"features.max_norm_ratio={ratio}: how many tokens are left differs between devices, "
            "which train on equal parts: use one device"
        )
    if cfg.features.tokens == "cls" and callbacks.reference_sheet_every_n_steps:
        raise ConfigError(
            "callbacks.reference_sheet_every_n_steps="
            f"{callbacks.reference_sheet_every_n_steps}: an SAE of the class token alone has no "
            "patches to show: set it to 0"
        )


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
    if not several or HydraConfig.get().mode != RunMode.MULTIRUN:
        return
    if cfg.together:
        raise ConfigError(
            f"trainer.devices={devices}: together=true trains on one device; leave out one of them"
        )
    started = SLURMEnvironment.detect() or "LOCAL_RANK" in os.environ
    if not started:
        raise ConfigError(
            f"trainer.devices={devices} in a sweep on this machine: Lightning would start the "
            "whole sweep once a device; run one job at a time, or use hydra/launcher=slurm"
        )


@dataclass(frozen=True)
class Training:
    """An SAE to be trained.

    Attributes:
        stage, folder: its place in the store, and the folder that it is written into.
        run: where its numbers are logged; None: nowhere.
    """

    cfg: DictConfig
    stage: Stage
    folder: Path
    run: Logger | None = None


def make(
    trainings: Sequence[Training],
    clip: FrozenCLIP,
    train_set: ImageDataset,
    held_out: ImageDataset,
    watch: Sequence[Callback] = (),
) -> dict[Path, Exception]:
    """Train SAEs on the same stream of tokens, each continuing from its checkpoint if there is one,
    or fit those with `model.fit`, and write them into their folders.

    Args:
        trainings: with configs that have `together.stream_key` and their precision in common.
        held_out: images for validation.
        watch: callbacks that observe the training.

    Returns:
        Why one of several failed, by the path of its stage. Of one alone the error is raised.
    """
    cfg = trainings[0].cfg
    precision.apply(cfg, clip)
    if rank_zero_only.rank == 0:
        log.info("%s", precision.described(cfg))
    places = {one.stage.path: clip.at(one.cfg.clip.layer).layer for one in trainings}
    configs = {places[one.stage.path]: one.cfg for one in trainings}
    layers = sorted(configs)
    clip.check_layers(layers)
    if (target := cfg.model.get("target_layer")) is not None:
        at_target = OmegaConf.merge(cfg, {"clip": {"layer": target}})
        configs.setdefault(clip.at(target).layer, at_target)
    cache = features.open_caches(dict(sorted(configs.items())), clip, train_set)
    with torch.device("meta"):
        saes = [build.build_sae(one.cfg, clip.width) for one in trainings if not _fits(one)]
    needs = {need for sae in saes for need in sae.needs}
    data = features.data_module(
        cfg, clip, train_set, held_out, cache=cache, layers=layers, needs=needs
    )
    own = {path: layer if len(layers) > 1 else None for path, layer in places.items()}
    errors: dict[Path, Exception] = {}
    for one in trainings:
        if _fits(one) and rank_zero_only.rank == 0:
            try:
                _fit(one, clip, data, train_set, own[one.stage.path])
            except Exception as error:
                if len(trainings) == 1:
                    raise
                errors[one.stage.path] = error
    if trainings := [one for one in trainings if not _fits(one)]:
        errors |= _train(trainings, clip, data, watch, own)
    return errors


def _fits(one: Training) -> bool:
    """Whether the SAE is fitted, not trained."""
    return one.cfg.model.get("fit") is not None


def _fit(
    one: Training,
    clip: FrozenCLIP,
    data: FeatureDataModule,
    train_set: ImageDataset,
    layer: int | None,
) -> None:
    """Fit an SAE to the tokens of the first images, and write it into its folder."""
    cfg, directions = one.cfg, None
    clip.to(build.best_device())
    if cfg.model.fit == "text":
        direct = clip.direct(torch.eye(clip.width, device=clip.device)).cpu()
        directions = baselines.text_directions(direct, _embeddings(cfg, clip, train_set))
    first = data.first_batch(cfg.model.initial_images)
    tokens = first if layer is None else first[layer]
    log.info("fitting %s to the tokens of %d images", one.stage.path.name, len(tokens))
    sae = build.user_error(
        baselines.fit,
        cfg.model.fit,
        tokens.flatten(0, 1),
        latents=cfg.model.latents,
        seed=cfg.seed,
        directions=directions,
        of=cfg.features.tokens,
    )
    _save(one, sae, {"fitted": cfg.model.fit, "images": len(tokens)})


def _texts(cfg: DictConfig, train_set: ImageDataset) -> list[tuple[Sequence[str], Any]]:
    """What `model.fit=text` names, with the prompts: the concepts of images whose concepts are
    known, by attribute, else their classes."""
    if has_truth(train_set):
        return [(KINDS[name].classnames, KINDS[name].templates) for name in IMAGE_ATTRIBUTES]
    return [(train_set.classnames, classifier.templates(cfg, train_set))]


def _embeddings(cfg: DictConfig, clip: FrozenCLIP, train_set: ImageDataset) -> torch.Tensor:
    """Text embeddings [M, e] of `_texts`, on the CPU; of classes those that are in the store."""
    if not has_truth(train_set):
        store = Store(cfg.paths.output_dir)
        return classifier.embeddings(cfg, store, clip, train_set, cfg.train_dataset.name)
    parts = [
        text_classifier(clip, names, templates, renormalize=cfg.evaluation.renormalize_text)
        for names, templates in _texts(cfg, train_set)
    ]
    return torch.cat(parts).cpu()


def _train(
    trainings: Sequence[Training],
    clip: FrozenCLIP,
    data: FeatureDataModule,
    watch: Sequence[Callback],
    layers: Mapping[Path, int | None],
) -> dict[Path, Exception]:
    """Train SAEs in one fit, and write them; why one of several failed, see `make`.

    Args:
        layers: that each reads, by the path of its stage; None where all read the same.
    """
    cfg = trainings[0].cfg
    checkpoints = Checkpoints(
        every_n_steps=cfg.callbacks.checkpoint_every_n_steps,
        every_n_seconds=cfg.callbacks.checkpoint_every_n_seconds,
    )
    options = {k: v for k, v in build.plain(cfg.trainer).items() if k not in MEMBER_OPTIONS}
    trainer = build.call_target(
        options,
        precision=precision.of_lightning(cfg),
        max_steps=sum(training.cfg.trainer.max_steps for training in trainings),
        logger=False,
        callbacks=[checkpoints, TokenRate(), BusyCores(), StepProgress(), *watch],
        plugins=_plugins(),
        default_root_dir=trainings[0].folder,
        **TRAINER_OPTIONS,
    )
    with ExitStack() as bars:
        group = SAEGroup([_module(one, clip, bars, layers[one.stage.path]) for one in trainings])
        try:
            trainer.fit(group, datamodule=data)
        except FloatingPointError as error:
            raise _diverged(trainings[0], error) from error
    if torch.distributed.is_initialized():  # or the evaluation's metrics wait for other ranks
        torch.distributed.destroy_process_group()
    errors: dict[Path, Exception] = {}
    for training, module in zip(trainings, group.members, strict=True):
        try:
            _write(training, module, trainer.is_global_zero)
        except Exception as error:
            if len(trainings) == 1:
                raise
            errors[training.stage.path] = error
    return errors


def _module(training: Training, clip: FrozenCLIP, bars: ExitStack, layer: int | None) -> SAEModule:
    cfg, k = training.cfg, training.cfg.model.get("k")

    def progress(step: int, max_steps: int, numbers: str | None) -> None:
        training.stage.progress(step, max_steps)

    if cfg.callbacks.progress_bar and rank_zero_only.rank == 0:
        name = cfg.model.name + (f" k={k}" if k else "")
        progress = bars.enter_context(Bar(f"training {name}", training.stage.progress))
    lightning.seed_everything(cfg.seed, workers=True, verbose=False)
    return SAEModule(
        build.build_sae(cfg, clip.width),
        **build.training_options(cfg),
        **{name: cfg.trainer[name] for name in MEMBER_OPTIONS if name in cfg.trainer},
        name=training.stage.path.name,
        run=training.run,
        checkpoint=training.stage.scratch / "last.ckpt",
        progress=progress,
        layer=layer,
    )


def _write(training: Training, module: SAEModule, is_global_zero: bool) -> None:
    """Write a trained SAE into its folder.

    Raises:
        Exception: why it is not finished.
    """
    name = training.stage.path.name
    if isinstance(module.error, FloatingPointError):
        raise _diverged(training, module.error) from module.error
    if module.error is not None:
        raise module.error
    if module.step < module.max_steps:
        kept = checkpoint_step(training.stage.scratch)
        raise ConfigError(
            f"{name} is not finished: Lightning ended its training after "
            f"{module.step:,} of {module.max_steps:,} steps{_why_ended(training.cfg)}"
            + ("" if kept is None else f"; the same command without it goes on from step {kept:,}")
        )
    if is_global_zero:
        _save(training, module.sae, {"steps": module.step, **module.numbers})


def _save(training: Training, sae: SAE, numbers: dict[str, Any]) -> None:
    sae.save(training.folder)
    build.save_config(training.cfg, training.folder)
    write_json(training.folder / "training.json", numbers)


def _diverged(training: Training, error: FloatingPointError) -> ConfigError:
    kept = checkpoint_step(training.stage.scratch)
    return ConfigError(
        f"{error}: the last good checkpoint "
        + (
            "is none"
            if kept is None
            else f"is that of step {kept:,}, kept in {training.stage.partial}"
        )
        + "; lower optimizer.learning_rate, or set trainer.gradient_clip_val=1"
    )


def _plugins() -> list[SLURMEnvironment] | None:
    """Lightning's own requeuing and submitit's would meet."""
    return [SLURMEnvironment(auto_requeue=False)] if SLURMEnvironment.detect() else None


def _why_ended(cfg: DictConfig) -> str:
    """The keys that may have ended a training early."""
    found = [f"trainer.{name}={v}" for name, v in cfg.trainer.items() if name in ENDING]
    return f" ({', '.join(found)})" if found else ""

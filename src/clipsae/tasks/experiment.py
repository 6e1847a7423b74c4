"""`task=experiment`: train the SAE unless it is finished, evaluate it, print the table."""

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning
import pandas as pd
import torch
from hydra.core.hydra_config import HydraConfig
from lightning.pytorch.loggers import Logger
from omegaconf import DictConfig, OmegaConf

from clipsae.clip import FrozenCLIP
from clipsae.data import FeatureDataModule, ImageDataset
from clipsae.errors import ConfigError
from clipsae.evaluation import check_topn_options, evaluate_topn
from clipsae.sae import SAE
from clipsae.store import Stage, Store, write_json
from clipsae.tasks import build
from clipsae.tasks.table import print_results
from clipsae.training.callbacks import ResumeCheckpoint, StepProgress, TokenRate
from clipsae.training.logging import finish, log_results
from clipsae.training.module import SAEModule
from clipsae.training.schedule import warmup_then

log = logging.getLogger(__name__)

IMAGES_WITH_RANDOM_WEIGHTS = 64


def run(cfg: DictConfig) -> None:
    """Train, evaluate, show. What is finished is used, what was interrupted is continued.

    Raises:
        ConfigError: something in the config that cannot be; before anything slow has begun.
    """
    clip = build.build_clip(cfg)
    test_set = build.build_dataset(cfg.dataset, cfg.evaluation.split, clip.image_size)
    train_set = build.build_dataset(build.train_dataset_node(cfg), "train", clip.image_size)
    check_options(cfg, clip, train_set)
    check_protocol(cfg, clip, test_set)
    store = Store(cfg.paths.output_dir)
    sae_stage = training_stage(cfg, store, train_set)
    evaluation_stage_ = evaluation_stage(cfg, store, sae_stage, test_set)

    with tracked(cfg, evaluation_stage_) as logger:
        if sae_stage.finished:
            log.info("using the trained SAE %s", sae_stage.path)
        sae_stage.make(lambda folder: train(cfg, clip, train_set, logger, sae_stage, folder))
        if limit_images(cfg) is not None:
            log.info("evaluating %d images only (evaluation.limit_images)", limit_images(cfg))
        if evaluation_stage_.finished:
            log.info("using the finished evaluation %s", evaluation_stage_.path)
        evaluation_stage_.make(lambda folder: evaluate(cfg, clip, sae_stage.path, test_set, folder))
        rows = pd.read_csv(evaluation_stage_.path / "results.csv")
        log_results(logger, rows.to_dict("records"), table_cells(rows))
    print_results(rows, sae=sae_stage.path, evaluation=evaluation_stage_.path)


def check_options(cfg: DictConfig, clip: FrozenCLIP, train_set: ImageDataset) -> None:
    """Refuse now, at no cost, what would be refused after the training or in its midst.

    Raises:
        ConfigError: an option of the SAE, its training or the evaluation that cannot be.
    """
    with torch.device("meta"):
        sae = build.build_sae(cfg, clip.width)
    options = build.training_options(cfg)
    build.user_error(SAEModule, sae, **options)
    build.user_error(warmup_then, options["decay"], options["warmup_steps"], cfg.trainer.max_steps)
    build.user_error(FeatureDataModule, clip, train_set, **build.plain(cfg.features))
    build.user_error(
        check_topn_options, cfg.evaluation.ns, cfg.evaluation.protocol, cfg.evaluation.settings
    )


def check_protocol(cfg: DictConfig, clip: FrozenCLIP, test_set: ImageDataset) -> None:
    """Refuse `heldout` where both splits are the same images: nothing would be held out.

    Raises:
        ConfigError: see above.
    """
    if cfg.evaluation.protocol != "heldout":
        return
    counted = build.build_dataset(cfg.dataset, "train", clip.image_size)
    if counted.fingerprint == test_set.fingerprint:
        raise ConfigError(
            f"evaluation.protocol=heldout: {cfg.dataset.name} has one split only, which would be "
            "counted and evaluated alike: use protocol=paper, or lay out train/ and test/"
        )


def training_stage(cfg: DictConfig, store: Store, train_set: ImageDataset) -> Stage:
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
    name = [cfg.model.name, cfg.clip.name, build.train_dataset_node(cfg).name]
    return store.stage("sae", [*name, f"m{cfg.model.latents}", f"s{cfg.seed}"], key)


def evaluation_stage(
    cfg: DictConfig, store: Store, sae_stage: Stage, test_set: ImageDataset
) -> Stage:
    """The place of the evaluation's results."""
    key = {
        "sae": sae_stage.path.name,
        "dataset": build.dataset_key(cfg.dataset, test_set),
        "evaluation": {
            **{k: v for k, v in build.plain(cfg.evaluation).items() if k != "batch_size"},
            "limit_images": limit_images(cfg),
            "count_threshold": cfg.model.count_threshold,
        },
    }
    name = [cfg.model.name, cfg.clip.name, cfg.dataset.name, cfg.evaluation.protocol]
    return store.stage("evaluation", [*name, f"s{cfg.seed}"], key)


def train(
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
    checkpoint = stage.scratch / "last.ckpt"
    callbacks = [
        ResumeCheckpoint(
            checkpoint,
            every_n_steps=cfg.callbacks.checkpoint_every_n_steps,
            every_n_seconds=cfg.callbacks.checkpoint_every_n_seconds,
        ),
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
    if checkpoint.exists():
        log.info("continuing the training of %s", stage.path.name)
    else:
        log.info("training %s", stage.path.name)
    trainer.fit(
        module,
        datamodule=data,
        ckpt_path=checkpoint if checkpoint.exists() else None,
        weights_only=True,
    )
    module.sae.save(folder)
    save_config(cfg, folder)
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    write_json(folder / "training.json", {"steps": trainer.global_step, **metrics})


def evaluate(
    cfg: DictConfig, clip: FrozenCLIP, sae_folder: Path, test_set: ImageDataset, folder: Path
) -> None:
    """Evaluate a trained SAE and write `results.csv` into `folder`."""
    options = cfg.evaluation
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    sae = SAE.load(sae_folder).to(device)
    clip = clip.to(device)
    count_set = None
    if options.protocol == "heldout":
        count_set = build.build_dataset(cfg.dataset, "train", clip.image_size)
    name = cfg.model.name
    result = evaluate_topn(
        clip,
        {name: sae},
        test_set,
        build.build_classifier(cfg, clip, test_set),
        ns=tuple(options.ns),
        settings=tuple(options.settings),
        protocol=options.protocol,
        count_dataset=count_set,
        count_threshold=cfg.model.count_threshold,
        batch_size=options.batch_size,
        limit_images=limit_images(cfg),
        num_workers=cfg.features.num_workers,
        device=device,
        sparsity=True,
    )
    about = {
        "model": name,
        "dataset": cfg.dataset.name,
        "clip": cfg.clip.name,
        "latents": cfg.model.latents,
        "k": cfg.model.get("k"),
        "seed": cfg.seed,
    }
    rows = [{**about, **{k: v for k, v in row.items() if k != "sae"}} for row in result.rows]
    pd.DataFrame(rows).to_csv(folder / "results.csv", index=False)
    write_json(
        folder / "diagnostics.json",
        {
            "count_threshold": result.count_threshold[name],
            "share_above_threshold": result.share_above_threshold[name],
            "active": result.active[name],
            "sparsity": result.sparsity[name],
            "class_accuracy": {
                f"{setting}_{n}" if n else setting: [
                    None if math.isnan(a) else a for a in accuracy.tolist()
                ]
                for (_, setting, n), accuracy in result.class_accuracy.items()
            },
        },
    )
    save_config(cfg, folder)


def limit_images(cfg: DictConfig) -> int | None:
    """How many images are evaluated; None: all. With random CLIP weights, whose numbers mean
    nothing, a few are enough to see that everything runs."""
    if cfg.evaluation.limit_images is None and cfg.clip.pretrained is None:
        return IMAGES_WITH_RANDOM_WEIGHTS
    return cfg.evaluation.limit_images


@contextmanager
def tracked(cfg: DictConfig, stage: Stage) -> Iterator[Logger | None]:
    """The job's one run in W&B or a CSV file, closed with the right exit code."""
    logger = build.call_target(
        cfg.logger,
        name=f"{cfg.model.name}-{cfg.dataset.name}-s{cfg.seed}",
        run_id=stage.path.name[-10:],
        job_type="experiment",
        run_config=public_config(cfg),
        folder=Path(cfg.paths.output_dir),
        run_folder=Path(HydraConfig.get().runtime.output_dir),
    )
    failed = True
    try:
        yield logger
        failed = False
    finally:
        finish(logger, failed)


def public_config(cfg: DictConfig) -> dict[str, Any]:
    """The resolved config without where things lie on this machine."""
    public = {key: value for key, value in build.plain(cfg).items() if key != "paths"}
    for group in ("dataset", "train_dataset"):
        public[group] = {k: v for k, v in public[group].items() if k not in build.PLACE_KEYS}
    return public


def save_config(cfg: DictConfig, folder: Path) -> None:
    """The resolved config beside the result."""
    (folder / "config.yaml").write_text(OmegaConf.to_yaml(cfg, resolve=True))


def table_cells(rows: pd.DataFrame) -> dict[str, float]:
    """The table's cells as flat names: `on_5`, `no_sae`, ... -> macro accuracy in percent."""
    names = [
        s if pd.isna(n) else f"{s}_{int(n)}" for s, n in zip(rows.setting, rows.n, strict=True)
    ]
    return {f"topn/{name}": float(a) for name, a in zip(names, rows.accuracy, strict=True)}

"""`task=experiment`: train the SAE unless it is finished, evaluate and measure it, print the
table."""

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pandas as pd
from hydra.core.hydra_config import HydraConfig
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig, OmegaConf

from clipsae.clip import FrozenCLIP
from clipsae.data import ImageDataset
from clipsae.data.reader import refuse_damaged
from clipsae.store import Stage, Store
from clipsae.tasks import build, together, watch
from clipsae.tasks.guidance import resolve_k
from clipsae.tasks.options import set_by_recipe
from clipsae.tasks.stages import classifier, evaluation, features, sae
from clipsae.tasks.table import print_results
from clipsae.training.logging import (
    finish,
    has_rows,
    has_run,
    log_failure,
    log_results,
    log_sae,
)

log = logging.getLogger(__name__)


def run(cfg: DictConfig) -> None:
    """Train, evaluate, measure, show. What is finished is used, what was interrupted is continued.

    Raises:
        ConfigError: an invalid config; before anything slow has begun.
    """
    store = Store(cfg.paths.output_dir)
    check(cfg)
    sae.check_options(cfg)
    resolve_k(cfg, store)
    clip = build.build_clip(cfg)
    test_set = build.build_dataset(cfg.dataset, cfg.evaluation.split, clip.image_size)
    train_set = build.build_dataset(cfg.train_dataset, "train", clip.image_size)
    sae.check(cfg, clip, train_set)
    trained = sae.stage(cfg, store, train_set)
    if not trained.finished and (line := set_by_recipe(cfg)):
        log.info("%s", line)

    def train(logger: Callable[[], Logger | None]) -> None:
        def make(folder: Path) -> None:
            held_out = build.build_dataset(cfg.train_dataset, "test", clip.image_size)
            own, callbacks = None, []
            if rank_zero_only.rank == 0:
                own, callbacks = logger(), watch.callbacks(cfg, store, clip, held_out)
            sae.make(cfg, clip, train_set, held_out, own, trained, folder, callbacks)

        together.make(trained, make, rank_zero_only.rank)

    read = [train_set]
    if not trained.finished:  # which looks at held-out images, too
        read.append(build.build_dataset(cfg.train_dataset, "test", clip.image_size))
    benchmark(cfg, store, clip, test_set, trained, train, read)


def check(cfg: DictConfig) -> None:
    """Refuse what the config alone shows cannot be evaluated or measured.

    Raises:
        ConfigError: see `evaluation.check_options`.
    """
    build.check_keys(cfg)
    evaluation.check_options(cfg)


def benchmark(
    cfg: DictConfig,
    store: Store,
    clip: FrozenCLIP,
    test_set: ImageDataset,
    trained: Stage,
    make_it: Callable[[Callable[[], Logger | None]], None],
    read: Sequence[ImageDataset] = (),
) -> None:
    """Make an SAE, evaluate and measure it (unless `evaluation=none`, `measurement=none`), show
    the numbers.

    Args:
        trained: the SAE's place in the store.
        make_it: makes it there, given what opens the job's logger.
        read: the images that making it reads.

    Raises:
        ConfigError: something invalid in the config, or an image that cannot be read;
            before the SAE is made.
    """
    evaluated = evaluation.stage(cfg, store, trained, test_set)
    if evaluated is not None:
        evaluation.check(cfg, clip, test_set, finished=evaluated.finished)
    stages = [stage for stage in (trained, evaluated) if stage is not None]
    for stage in stages:
        if stage.finished:
            log.info("using the finished %s", stage.path)

    if not trained.finished:
        if cfg.evaluation.protocol == "heldout":
            read = [*read, build.build_dataset(cfg.dataset, "train", clip.image_size)]
        for images in (*read, test_set):
            refuse_damaged(images, cfg.features.num_workers)

    def evaluate(folder: Path) -> None:
        classes = None
        if cfg.evaluation.settings:
            classes = classifier.embeddings(cfg, store, clip, test_set)
        evaluation.make(cfg, clip, trained, classes, test_set, evaluated, folder)

    def look() -> tuple[pd.DataFrame, dict[str, float], dict[str, float]]:
        """Make what is missing: the rows of top-n classification, the measured numbers, and both
        as the logger takes them."""
        if evaluated is None:
            return pd.DataFrame(), {}, {}
        together.make(evaluated, evaluate)
        rows, metrics = evaluation.read(evaluated.path)
        cells = {}
        if not rows.empty:
            evaluation.check_zero_shot(cfg, test_set, rows)
            cells = table_cells(rows)
        return rows, metrics, cells | {f"measure/{m}": value for m, value in metrics.items()}

    finished = all(stage.finished for stage in stages)
    results = evaluated or trained

    def tell(logger: Callable[[], Logger | None]) -> tuple[pd.DataFrame, dict[str, float]]:
        rows, metrics, cells = look()
        if not (finished and was_told(cfg, results)):
            log_results(logger(), rows.to_dict("records"), cells)
            log_sae(logger(), trained.path, [cfg.model.name, f"seed-{cfg.seed}"])
        return rows, metrics

    # The training's run is the SAE's, whichever dataset's job trains it. (An agent of W&B gives a
    # job one run.)
    one_run = results is trained or "WANDB_SWEEP_ID" in os.environ
    with tracked(cfg, trained, "train") as logger:
        make_it(logger)
        if rank_zero_only.rank > 0:  # the rest is the first rank's
            return
        if one_run:
            rows, metrics = tell(logger)
    if not one_run:
        with tracked(cfg, results, "evaluate") as logger:
            rows, metrics = tell(logger)
    print_results(rows, metrics, [stage.path for stage in stages])


@contextmanager
def tracked(cfg: DictConfig, stage: Stage, job_type: str) -> Iterator[Callable[[], Logger | None]]:
    """A stage's run in W&B or a CSV file, opened when it is first asked for, closed with the right
    exit code.

    Args:
        job_type: "train" for an SAE's own run, which names the dataset that it is trained on;
            "evaluate" or "explore" for what comes of `cfg.dataset`.
    """
    if job_type == "train":
        cfg = OmegaConf.merge(cfg)  # a copy
        OmegaConf.update(cfg, "dataset", cfg.train_dataset, merge=False)

    @cache
    def logger() -> Logger | None:
        return build.call_target(
            logger_options(cfg),
            name=f"{cfg.model.name}-{cfg.dataset.name}-s{cfg.seed}",
            run_id=stage.path.name[-10:],
            job_type=job_type,
            run_config=public_config(cfg),
            folder=Path(cfg.paths.output_dir),
            run_folder=Path(HydraConfig.get().runtime.output_dir),
        )

    failed, coming_back = True, False
    try:
        yield logger
        failed = False
    except Exception as error:
        if rank_zero_only.rank == 0:
            log_failure(logger(), error)  # to be seen there, however early it is
        raise
    except SystemExit:  # preempted
        coming_back = True
        raise
    finally:
        if logger.cache_info().currsize:
            finish(logger(), failed, coming_back)


def was_told(cfg: DictConfig, stage: Stage) -> bool:
    """Whether the logger has had a stage's results from an earlier job, and is not asked for
    more."""
    if cfg.logger.get("upload_sae"):
        return False
    return has_run(Path(cfg.paths.output_dir), stage.path.name[-10:]) or has_rows(
        Path(HydraConfig.get().runtime.output_dir)
    )


def logger_options(cfg: DictConfig) -> dict[str, Any]:
    """`cfg.logger` with the tags that every run has."""
    options = build.plain(cfg.logger)
    if "tags" in options:
        options["tags"] = [*options["tags"], cfg.model.name, cfg.dataset.name, cfg.clip.name]
    return options


def public_config(cfg: DictConfig) -> dict[str, Any]:
    """The resolved config without where things lie on this machine."""
    public = {key: value for key, value in build.plain(cfg).items() if key != "paths"}
    for group in ("dataset", "train_dataset"):
        public[group] = {k: v for k, v in public[group].items() if k not in build.PLACE_KEYS}
    if features.cached(cfg):
        public["features"]["cache"].pop("folder")
    return _without_folders(public)


def _without_folders(value: Any) -> Any:
    """The same with the last name alone of absolute paths: weights, plugins."""
    if isinstance(value, dict):
        return {key: _without_folders(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_without_folders(one) for one in value]
    if isinstance(value, str) and Path(value).expanduser().is_absolute():
        return Path(value).name
    return value


def table_cells(rows: pd.DataFrame) -> dict[str, float]:
    """The table's cells as flat names: `on_5`, `no_sae`, ... -> macro accuracy in percent."""
    names = [
        s if pd.isna(n) else f"{s}_{int(n)}" for s, n in zip(rows.setting, rows.n, strict=True)
    ]
    return {f"topn/{name}": float(a) for name, a in zip(names, rows.accuracy, strict=True)}

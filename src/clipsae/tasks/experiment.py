"""`task=experiment`: train the SAE unless it is finished, evaluate and measure it, print the
table."""

import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig

from clipsae.clip import FrozenCLIP
from clipsae.data import ImageDataset
from clipsae.data.reader import refuse_damaged
from clipsae.store import Stage, Store, make_all
from clipsae.tasks import build, guidance, precision, watch
from clipsae.tasks.options import set_by_recipe
from clipsae.tasks.stages import classifier, evaluation, features, sae
from clipsae.tasks.table import print_results
from clipsae.tasks.tracking import Run
from clipsae.training.logging import log_results, log_sae

log = logging.getLogger(__name__)


@dataclass(eq=False)
class Experiment:
    """An SAE and its results on one dataset: a single run, or a cell of a sweep. To be made in the
    job that it belongs to.

    Attributes:
        trained, evaluated: the places in the store; `evaluated` None: `evaluation=none
            measurement=none`.
        train_set: None: the SAE was not trained here, and is there.
        new: whether one of them was yet to be made.
        run: of the training, in W&B or a CSV file.
        training_error, error: why it failed.
    """

    cfg: DictConfig
    store: Store
    clip: FrozenCLIP
    test_set: ImageDataset
    trained: Stage
    train_set: ImageDataset | None = None
    evaluated: Stage | None = field(init=False)
    new: bool = field(init=False)
    run: Run = field(init=False)
    training_error: Exception | None = field(default=None, init=False)
    error: Exception | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        cfg = self.cfg
        self.evaluated = evaluation.stage(cfg, self.store, self.trained, self.test_set)
        finished = [stage for stage in self.stages if stage.finished]
        if self.evaluated is not None:
            done = self.evaluated in finished
            evaluation.check(cfg, self.clip, self.test_set, finished=done)
        for stage in finished:
            log.info("using the finished %s", stage.path)
        self.new = len(finished) < len(self.stages)
        if self.trained not in finished:
            for images in self._read():
                refuse_damaged(images, cfg.features.num_workers)
        self.run = Run(cfg, self.trained, "train")

    def _read(self) -> Iterable[ImageDataset]:
        """The images that training and evaluation read from their files."""
        if self.train_set is not None:
            cached = features.cached(self.cfg) is not None
            if not (cached and features.stage(self.cfg, self.train_set).finished):
                yield self.train_set
            yield self.held_out()
        if self.cfg.evaluation.protocol == "heldout":
            yield build.build_dataset(self.cfg.dataset, "train", self.clip.image_size)
        yield self.test_set

    def held_out(self) -> ImageDataset:
        """The images that the training is validated on."""
        return build.build_dataset(self.cfg.train_dataset, "test", self.clip.image_size)

    @property
    def stages(self) -> list[Stage]:
        return [self.trained] + ([] if self.evaluated is None else [self.evaluated])

    @property
    def has_one_run(self) -> bool:
        """Whether the results are logged in the training's run."""
        # (An agent of a W&B sweep gives a job one run.)
        return self.evaluated is None or "WANDB_SWEEP_ID" in os.environ

    def show(self) -> None:
        """Log the results, unless an earlier job did, and print them.

        Raises:
            Exception: why the SAE was not trained or evaluated.
        """
        if self.training_error is not None:
            raise self.training_error
        if rank_zero_only.rank > 0:
            return
        run = self.run
        if not self.has_one_run:
            run = Run(self.cfg, self.evaluated, "evaluate")
        with run:
            if self.error is not None:
                raise self.error
            rows, metrics = pd.DataFrame(), {}
            if self.evaluated is not None:
                rows, metrics = evaluation.read(self.evaluated.path)
            if not rows.empty:
                evaluation.check_zero_shot(self.cfg, self.test_set, rows)
            if self.new or not run.has_results():
                cells = {f"measure/{name}": value for name, value in metrics.items()}
                log_results(run.logger(), rows.to_dict("records"), table_cells(rows) | cells)
                log_sae(
                    run.logger(), self.trained.path, [self.cfg.model.name, f"seed-{self.cfg.seed}"]
                )
        print_results(rows, metrics, [stage.path for stage in self.stages])


def run(cfg: DictConfig) -> None:
    """Train, evaluate, measure, show. What is finished is used, what was interrupted is continued.

    Raises:
        ConfigError: an invalid config; before anything slow has begun.
    """
    finish(prepare(cfg))


def finish(experiment: Experiment) -> None:
    """Make what is missing of one experiment, and show its results."""
    produce([experiment])
    experiment.show()


def prepare(cfg: DictConfig) -> Experiment:
    """What a config asks for.

    Raises:
        ConfigError: an invalid config, or an image that cannot be read.
    """
    store = Store(cfg.paths.output_dir)
    check(cfg)
    sae.check_options(cfg)
    guidance.resolve(cfg, store)
    clip = build.build_clip(cfg)
    test_set = build.build_dataset(cfg.dataset, cfg.evaluation.split, clip.image_size)
    train_set = build.build_dataset(cfg.train_dataset, "train", clip.image_size)
    sae.resolve_latents(cfg, clip, train_set)
    trained = precision.resolve(cfg, lambda: sae.stage(cfg, store, train_set))
    sae.check(cfg, clip, train_set)
    if not trained.finished and (line := set_by_recipe(cfg)):
        log.info("%s", line)
    return Experiment(cfg, store, clip, test_set, trained, train_set)


def check(cfg: DictConfig) -> None:
    """Refuse what the config alone shows cannot be evaluated or measured.

    Raises:
        ConfigError: see `evaluation.check_options`.
    """
    build.check_keys(cfg)
    evaluation.check_options(cfg)


def produce(experiments: Sequence[Experiment]) -> None:
    """Train the SAEs that are missing, all in one fit, and evaluate those that are not evaluated,
    in one pass over each dataset. Why one fails is noted as its `error`.

    Args:
        experiments: with the same `together.stream_key`.
    """
    try:
        _train(experiments)
        for experiment in experiments:
            if experiment.training_error or not experiment.has_one_run:
                experiment.run.close(experiment.training_error)
        if rank_zero_only.rank == 0:
            _evaluate([one for one in experiments if one.training_error is None])
    except BaseException as error:
        for experiment in experiments:
            experiment.run.close(error)
        raise


def _train(experiments: Sequence[Experiment]) -> None:
    fits: dict[str, dict[Path, Experiment]] = {}  # by what precision=auto was replaced by
    for experiment in experiments:
        if experiment.train_set is not None:
            same = fits.setdefault(experiment.cfg.precision, {})
            same.setdefault(experiment.trained.path, experiment)
    errors: dict[Path, Exception] = {}
    for due in fits.values():

        def train(
            folders: Mapping[Path, Path], due: Mapping[Path, Experiment] = due
        ) -> dict[Path, Exception]:
            some = [due[path] for path in folders]
            one = some[0]
            held_out = one.held_out()
            callbacks = []
            if rank_zero_only.rank == 0:
                callbacks = watch.callbacks(one.cfg, one.store, one.clip, held_out)
            trainings = [
                sae.Training(each.cfg, each.trained, folders[each.trained.path], each.run.logger())
                for each in some
            ]
            return sae.make(trainings, one.clip, one.train_set, held_out, callbacks)

        errors |= make_all([one.trained for one in due.values()], train, rank_zero_only.rank)
    for experiment in experiments:
        experiment.training_error = errors.get(experiment.trained.path)


def _evaluate(experiments: Sequence[Experiment]) -> None:
    passes: dict[str, dict[Path, Experiment]] = {}
    for experiment in experiments:
        if experiment.evaluated is not None:
            same = passes.setdefault(evaluation.pass_key(experiment.cfg), {})
            same.setdefault(experiment.evaluated.path, experiment)
    errors: dict[Path, Exception] = {}
    for due in passes.values():

        def evaluate(
            folders: Mapping[Path, Path], due: Mapping[Path, Experiment] = due
        ) -> dict[Path, Exception]:
            some = [due[path] for path in folders]
            one = some[0]
            classes = None
            if one.cfg.evaluation.settings:
                classes = classifier.embeddings(one.cfg, one.store, one.clip, one.test_set)
            work = [
                evaluation.Due(each.cfg, each.trained, each.evaluated, folders[path])
                for path, each in zip(folders, some, strict=True)
            ]
            evaluation.make(work, one.clip, classes, one.test_set)
            return {}

        errors |= make_all([one.evaluated for one in due.values()], evaluate)
    for experiment in experiments:
        if experiment.evaluated is not None:
            experiment.error = errors.get(experiment.evaluated.path)


def table_cells(rows: pd.DataFrame) -> dict[str, float]:
    """The table's cells as flat names: `on_5`, `no_sae`, ... -> macro accuracy in percent."""
    if rows.empty:
        return {}
    names = [
        s if pd.isna(n) else f"{s}_{int(n)}" for s, n in zip(rows.setting, rows.n, strict=True)
    ]
    return {f"topn/{name}": float(a) for name, a in zip(names, rows.accuracy, strict=True)}

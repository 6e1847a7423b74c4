"""A job's runs in W&B or a CSV file: opened when there is something to log, closed with the right
exit code."""

from pathlib import Path
from types import TracebackType
from typing import Any

from hydra.core.hydra_config import HydraConfig
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig, OmegaConf

from clipsae.store import Stage
from clipsae.tasks import build
from clipsae.tasks.stages import features
from clipsae.training.logging import finish, has_rows, has_run, log_failure


class Run:
    """The run of a stage, whose id is the stage's. To be made in the job that it belongs to.

    Args:
        job_type: "train" for an SAE's own run, which names the dataset that it is trained on;
            "evaluate", "explore" or "name" for what comes of `cfg.dataset`.
    """

    def __init__(self, cfg: DictConfig, stage: Stage, job_type: str) -> None:
        if job_type == "train":
            cfg = OmegaConf.merge(cfg)  # a copy
            OmegaConf.update(cfg, "dataset", cfg.train_dataset, merge=False)
        self.cfg, self.stage, self.job_type = cfg, stage, job_type
        self.folder = Path(HydraConfig.get().runtime.output_dir)
        self._logger: Logger | None = None
        self._is_open = False

    def logger(self) -> Logger | None:
        """What logs into the run; None: nothing does, or this is not the first rank."""
        if not self._is_open and rank_zero_only.rank == 0:
            cfg = self.cfg
            self._logger = build.call_target(
                logger_options(cfg),
                name=f"{cfg.model.name}-{cfg.dataset.name}-s{cfg.seed}",
                run_id=self.stage.path.name[-10:],
                job_type=self.job_type,
                run_config=public_config(cfg),
                folder=Path(cfg.paths.output_dir),
                run_folder=self.folder,
            )
            self._is_open = True
        return self._logger

    def has_results(self) -> bool:
        """Whether an earlier job has logged the results, and nothing more is asked for."""
        if self.cfg.logger.get("upload_sae"):
            return False
        output_dir = Path(self.cfg.paths.output_dir)
        return has_run(output_dir, self.stage.path.name[-10:]) or has_rows(self.folder)

    def close(self, error: BaseException | None = None) -> None:
        """Close it if it is open. An error is logged first, however early it came; one that asks
        the job to leave (SystemExit) marks the run as preempted."""
        if isinstance(error, Exception):
            log_failure(self.logger(), error)
        if self._is_open:
            finish(self._logger, error is not None, isinstance(error, SystemExit))
        self._logger, self._is_open = None, False

    def __enter__(self) -> "Run":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close(error)


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
    if cache := features.cached(cfg):
        public["features"][cache].pop("folder")
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

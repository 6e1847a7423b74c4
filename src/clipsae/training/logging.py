"""Where numbers go: W&B, a CSV file, or nowhere. One run a job, whatever the job does."""

import logging
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import CSVLogger, Logger, WandbLogger

log = logging.getLogger(__name__)


def wandb_logger(
    *,
    project: str,
    entity: str | None,
    mode: str | None,
    group: str | None,
    tags: list[str],
    name: str,
    run_id: str,
    job_type: str,
    run_config: dict[str, Any],
    folder: Path,
    run_folder: Path,
) -> WandbLogger:
    """A W&B run that never stops the work: without login or network it is written offline.

    Args:
        project, entity, group, tags, name, job_type: as W&B shows them.
        mode: "online", "offline", or None for online where a login is found.
        run_id: the same for the same work, so that a continued job continues its run.
        run_config: plain values, without paths and secrets.
        folder: offline runs lie under `folder/wandb`.
        run_folder: the job's own folder; not used by W&B.

    Raises:
        ValueError: an unknown mode.
    """
    import wandb

    if mode not in (None, "online", "offline", "disabled"):
        raise ValueError(f"logger.mode={mode!r}: expected online, offline, disabled or null")
    folder.mkdir(parents=True, exist_ok=True)
    options = {
        "project": project,
        "entity": entity,
        "group": group,
        "tags": tags,
        "name": name,
        "id": run_id,
        "job_type": job_type,
        "config": run_config,
        "dir": folder,
        "settings": wandb.Settings(init_timeout=30, silent=True, console="off"),
    }
    mode = mode or ("online" if logged_in() else "offline")
    if mode == "online":
        try:
            run = wandb.init(mode="online", resume="allow", **options)
        except wandb.errors.Error as error:
            log.warning("W&B: OFFLINE, since the server did not take the run: %s", error)
            mode = "offline"
    if mode != "online":
        run = wandb.init(mode=mode, **options)
        if mode == "offline":
            log.warning("W&B: offline run in %s; `wandb sync` sends it later", Path(run.dir).parent)
    return WandbLogger(experiment=run)


def logged_in() -> bool:
    """Whether W&B finds a login, without asking for one or reaching the network."""
    import wandb

    try:
        return bool(wandb.login(prompt=False, verify=False))
    except (wandb.errors.Error, ValueError):
        return False


def csv_logger(*, run_folder: Path, **_: Any) -> CSVLogger:
    """`metrics.csv` in the job's own folder."""
    return CSVLogger(save_dir=run_folder, name="", version="")


def no_logger(**_: Any) -> None:
    """No logging."""


def log_results(logger: Logger | None, rows: list[dict[str, Any]], cells: dict[str, float]) -> None:
    """The table of a finished evaluation: rows as a W&B Table, cells in the run's summary.

    Args:
        logger: what `wandb_logger`, `csv_logger` or `no_logger` made.
        rows: tidy rows, all with the same keys.
        cells: name -> number.
    """
    if logger is None:
        return
    if isinstance(logger, WandbLogger):
        columns = list(rows[0])
        logger.log_table("results", columns=columns, data=[[r[c] for c in columns] for r in rows])
        logger.experiment.summary.update(cells)
    else:
        logger.log_metrics(cells)


def log_histogram(logger: Logger | None, name: str, values: Any, step: int) -> None:
    """A histogram, where the logger can show one.

    Args:
        name: as W&B shows it.
        values: numbers [M], a NumPy array; nothing is logged where it is empty.
        step: the training step it belongs to.
    """
    if isinstance(logger, WandbLogger) and len(values):
        import wandb

        histogram = wandb.Histogram(values, num_bins=64)
        logger.experiment.log({name: histogram, "trainer/global_step": step})


def finish(logger: Logger | None, failed: bool) -> None:
    """Close the run, or the next job of this process would log into it."""
    if isinstance(logger, WandbLogger):
        logger.experiment.finish(exit_code=1 if failed else 0)
    elif logger is not None:
        logger.finalize("failed" if failed else "success")

"""Loggers: W&B, a CSV file, or none."""

import csv
import json
import logging
import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import CSVLogger, Logger, WandbLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from PIL import Image

log = logging.getLogger(__name__)

_open: list[Any] = []  # the W&B runs of this process that are not closed


@contextmanager
def _only_warns() -> Iterator[None]:
    """An error of W&B becomes a warning: the compute is dearer than the dashboard."""
    try:
        yield
    except Exception as error:
        log.warning("W&B: %s: %s; the run continues", type(error).__name__, error)


class PatientWandbLogger(WandbLogger):
    """A W&B run whose errors never end the work."""

    log_metrics = _only_warns()(WandbLogger.log_metrics)
    log_table = _only_warns()(WandbLogger.log_table)
    finalize = _only_warns()(WandbLogger.finalize)


def wandb_logger(
    *,
    mode: str | None,
    run_id: str,
    run_config: dict[str, Any],
    folder: Path,
    run_folder: Path,
    finish_timeout: float = 300.0,
    upload_sae: bool = False,
    **shown: Any,
) -> PatientWandbLogger | None:
    """A W&B run that never stops the work: without login or network it is written offline. If the
    server is lost later, W&B retries; what it has not got in the end is on disk.

    Args:
        shown: project, entity, group, tags, name, job_type: as `wandb.init` takes them.
        mode: "online", "offline", "disabled" (no run at all), or None: what the variables
            WANDB_MODE and WANDB_DISABLED ask for, else online where a login is found.
        run_id: the same for the same work, so that a continued job continues its run.
        run_config: plain values, without paths and secrets.
        folder: offline runs lie under `folder/wandb`.
        run_folder: the job's own folder; not used by W&B.
        finish_timeout: seconds that the end of a run waits for its upload.
        upload_sae: whether `log_sae` uploads.

    Raises:
        ValueError: an unknown mode.
    """
    import wandb

    mode = mode or asked_mode()
    if mode not in (None, "online", "offline", "disabled"):
        raise ValueError(f"logger.mode={mode!r}: expected online, offline, disabled or null")
    if mode == "disabled":
        return None
    folder.mkdir(parents=True, exist_ok=True)
    options = {
        **shown,
        "id": run_id,
        "config": run_config,
        "dir": folder,
        "settings": wandb.Settings(
            init_timeout=30,
            finish_timeout=finish_timeout,
            finish_timeout_raises=True,
            silent=True,
            console="off",
            reinit="create_new",  # SAEs that train together have a run each
        ),
    }
    if "WANDB_SWEEP_ID" in os.environ:  # its agent has given the run an id
        del options["id"]
    mode = mode or ("online" if logged_in() else "offline")
    if mode == "online":
        try:
            resume = "allow" if "id" in options else None
            run = wandb.init(mode="online", resume=resume, **options)
        except Exception as error:  # W&B's own, and those of its process
            log.warning("W&B: OFFLINE, since the server did not take the run: %s", error)
            mode = "offline"
    if mode != "online":
        run = wandb.init(mode="offline", **options)
        log.warning("W&B: offline run in %s; `wandb sync` sends it later", Path(run.dir).parent)
    _open.append(run)
    logger = PatientWandbLogger(experiment=run)
    logger.upload_sae = upload_sae
    return logger


def asked_mode() -> str | None:
    """What W&B's own variables ask for; None: nothing."""
    if os.environ.get("WANDB_DISABLED", "").lower() in ("true", "1", "yes"):
        return "disabled"
    found = os.environ.get("WANDB_MODE") or None
    return {"dryrun": "offline", "run": "online"}.get(found, found)  # as they were once called


def has_run(folder: Path, run_id: str) -> bool:
    """Whether a W&B run of this id was begun from here before: its folder is there.

    Args:
        folder, run_id: as `wandb_logger` takes them.
    """
    return any((folder / "wandb").glob(f"*run-*-{run_id}"))


def logged_in() -> bool:
    """Whether W&B finds a login, without asking for one or reaching the network."""
    import wandb

    try:
        return bool(wandb.login(prompt=False, verify=False))
    except (wandb.errors.Error, ValueError):
        return False


def csv_logger(*, run_folder: Path, **_: Any) -> CSVLogger:
    """`metrics.csv` in the job's own folder. What is there stays: a run that goes on, or the same
    command again, adds its rows."""
    logger = CSVLogger(save_dir=run_folder, name="", version="")
    logger._experiment = _AddingWriter(logger.log_dir)
    return logger


def has_rows(run_folder: Path) -> bool:
    """Whether a CSV logger has written in a job's folder before."""
    return (run_folder / ExperimentWriter.NAME_METRICS_FILE).is_file()


class _AddingWriter(ExperimentWriter):
    """Lightning's writer of a CSV file, which removes what an earlier run wrote."""

    def _check_log_dir_exists(self) -> None:
        file = Path(self.metrics_file_path)
        if file.is_file():
            with file.open(newline="") as lines:
                self.metrics_keys = next(csv.reader(lines), [])

    def _rewrite_with_new_header(self, fieldnames: list[str]) -> None:
        """Rewrite the file with more columns: aside, so that a kill leaves the old one."""
        file = Path(self.metrics_file_path)
        with file.open(newline="") as lines:
            rows = list(csv.DictReader(lines))
        aside = file.with_name(f".{file.name}.tmp")
        with aside.open("w", newline="") as lines:
            writer = csv.DictWriter(lines, fieldnames)
            writer.writeheader()
            writer.writerows(rows)
        aside.replace(file)


def no_logger(**_: Any) -> None:
    """No logging."""


def log_results(logger: Logger | None, rows: list[dict[str, Any]], cells: dict[str, float]) -> None:
    """The table of a finished evaluation: rows as a W&B Table, the accuracy of each setting over n
    as curves `topn/<dataset>/<setting>` over `topn/n`, cells in the run's summary.

    Args:
        logger: what `wandb_logger`, `csv_logger` or `no_logger` made.
        rows: tidy rows, all with the same keys; none, where there was no evaluation.
        cells: name -> number.
    """
    if logger is None:
        return
    if isinstance(logger, WandbLogger):
        if rows:
            columns = list(rows[0])
            data = [[r[c] for c in columns] for r in rows]
            logger.log_table("results", columns=columns, data=data)
        with _only_warns():
            for n in sorted({row["n"] for row in rows if row["n"] == row["n"]}):  # not NaN
                at_n = {
                    f"topn/{r['dataset']}/{r['setting']}": r["accuracy"]
                    for r in rows
                    if r["n"] == n
                }
                logger.experiment.log({"topn/n": n, **at_n})
            logger.experiment.summary.update(cells)
    else:
        logger.log_metrics(cells)


def log_table(
    logger: Logger | None, name: str, rows: list[dict[str, Any]], cells: Mapping[str, float]
) -> None:
    """A table in W&B, and numbers in the run's summary; a CSV logger has the numbers alone.

    Args:
        rows: all with the same keys.
        cells: name -> number.
    """
    if isinstance(logger, WandbLogger):
        columns = list(rows[0])
        logger.log_table(name, columns=columns, data=[list(row.values()) for row in rows])
        with _only_warns():
            logger.experiment.summary.update(dict(cells))
    elif logger is not None:
        logger.log_metrics(dict(cells))


@_only_warns()
def log_failure(logger: Logger | None, error: Exception) -> None:
    """Why a job failed, in the run's summary."""
    if isinstance(logger, WandbLogger):
        logger.experiment.summary["failure"] = f"{type(error).__name__}: {error}"


@_only_warns()
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


def log_picture(logger: Logger | None, name: str, png: bytes, step: int) -> None:
    """A picture: in W&B, or as a file `<name>-<step>.png` in the folder of a CSV logger.

    Args:
        name: as W&B shows it.
        png: the file's content.
        step: the training step it belongs to.
    """
    if isinstance(logger, WandbLogger):
        import wandb

        with _only_warns():
            shown = wandb.Image(Image.open(BytesIO(png)))
            logger.experiment.log({name: shown, "trainer/global_step": step})
    elif isinstance(logger, CSVLogger):
        file = Path(logger.log_dir) / f"{name}-{step:06d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(png)


@_only_warns()
def log_sae(logger: Logger | None, folder: Path, aliases: list[str]) -> None:
    """Upload a trained SAE as an artifact, where the logger was asked to (`upload_sae`).

    Args:
        folder: with `sae.safetensors` and `sae.json`; its name becomes the artifact's.
        aliases: by which it is found, beside "latest".
    """
    if not isinstance(logger, PatientWandbLogger) or not logger.upload_sae:
        return
    import wandb

    about = json.loads((folder / "sae.json").read_text())
    artifact = wandb.Artifact(folder.name, type="sae", metadata=about["config"])
    for name in ("sae.safetensors", "sae.json"):
        artifact.add_file(str(folder / name), policy="immutable")
    logger.experiment.log_artifact(artifact, aliases=["latest", *aliases])


@_only_warns()
def log_page(logger: Logger | None, folder: Path, aliases: list[str]) -> None:
    """Upload a page, the whole folder of it, as an artifact of type "explore".

    Args:
        folder: with `index.html`; its name becomes the artifact's, "-" in place of "+", which W&B
            does not take.
        aliases: by which it is found, beside "latest".
    """
    if not isinstance(logger, PatientWandbLogger):
        return
    import wandb

    artifact = wandb.Artifact(folder.name.replace("+", "-"), type="explore")
    # W&B's own copy: a page is rewritten in the same place, maybe before an offline run is sent.
    artifact.add_dir(str(folder), policy="mutable")
    logger.experiment.log_artifact(artifact, aliases=["latest", *aliases])


def finish(logger: Logger | None, failed: bool, coming_back: bool = False) -> None:
    """Close the run, or the next job of this process would log into it.

    Args:
        failed: the job ends with an error.
        coming_back: it is preempted, and continues later; W&B then shows so.
    """
    if isinstance(logger, WandbLogger):
        run = logger.experiment
        if run in _open:  # else it was closed before the job was queued again
            _open.remove(run)
            _close(run, failed, coming_back)
    elif logger is not None:
        logger.finalize("failed" if failed else "success")


def close_preempted(seconds: float = 20.0) -> None:
    """Close the W&B runs of a job that is about to be queued again; they are shown as preempted.

    Afterwards is too late: W&B's own process is sent SIGTERM, too, and loses what it has not
    written: of an offline run its last 32 KiB, which may be everything.

    Done by another thread, since the handler of a signal, which calls this, may have interrupted
    W&B itself.

    Args:
        seconds: how long to wait for it at most.
    """
    runs, _open[:] = _open.copy(), []

    def close() -> None:
        for run in runs:
            _close(run, failed=True, coming_back=True)

    closing = threading.Thread(target=close, daemon=True)
    closing.start()
    closing.join(seconds)


def _close(run: Any, failed: bool, coming_back: bool) -> None:
    folder = Path(run.dir).parent
    try:
        if coming_back:
            run.mark_preempting()
        run.finish(exit_code=1 if failed else 0)
    except Exception as error:
        log.warning("W&B: %s: `wandb sync %s` sends what is missing", error, folder)

"""What happens around the steps: the checkpoint that a killed run continues from, the speed, the
progress line."""

import logging
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, Checkpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException

from clipsae.progress import Bar
from clipsae.store import put_checkpoint
from clipsae.store.files import checkpoint_step

log = logging.getLogger(__name__)


class BetweenSteps(Callback):
    """Calls `between_steps` after every optimizer step; where a validation follows, after that,
    so that a run that goes on from a checkpoint does not repeat it."""

    _seen = -1

    def between_steps(self, trainer: Trainer) -> None:
        raise NotImplementedError

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._seen = trainer.global_step

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        if not _validates_next(trainer):
            self._call(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._call(trainer)

    def _call(self, trainer: Trainer) -> None:
        if trainer.global_step != self._seen:  # not in the middle of an accumulated batch
            self._seen = trainer.global_step
            self.between_steps(trainer)


def _validates_next(trainer: Trainer) -> bool:
    """Whether a validation comes before the next batch."""
    every = trainer.val_check_batch
    if not trainer.enable_validation or every is None:
        return False
    return (trainer.fit_loop.epoch_loop.total_batch_idx + 1) % every == 0


class ResumeCheckpoint(BetweenSteps, Checkpoint):
    """Keeps one checkpoint, the newest whole one.

    Lightning's own writes through a temporary file that may lie on another file system, from
    where a move is a copy: a kill in the middle leaves half a file under the final name. Here it
    is written beside its place, flushed to disk, renamed, and its checksum noted, by which
    `whole_checkpoint` knows a damaged one.

    Args:
        path: where the checkpoint lies.
        every_n_steps: optimizer steps between checkpoints.
        every_n_seconds: a checkpoint at least this often, too; the time is checked between
            steps, and does not change what is trained.
    """

    def __init__(
        self, path: Path, every_n_steps: int = 500, every_n_seconds: float = 300.0
    ) -> None:
        if every_n_steps < 1:
            raise ValueError(f"every_n_steps={every_n_steps}: must be at least 1")
        self.path = Path(path)
        self.every_n_steps = every_n_steps
        self.every_n_seconds = every_n_seconds
        self.last_step = -1
        self.last_time = time.monotonic()
        self.newest_step = -1
        self.accumulating = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self.last_step, self.last_time = trainer.global_step, time.monotonic()
        self.newest_step = trainer.global_step

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        self.accumulating = trainer.global_step == self.newest_step
        self.newest_step = trainer.global_step
        super().on_train_batch_end(trainer, *args)

    def between_steps(self, trainer: Trainer) -> None:
        due = trainer.global_step % self.every_n_steps == 0
        if trainer.world_size == 1:  # ranks would not agree on the time
            due = due or time.monotonic() - self.last_time >= self.every_n_seconds
        if due:
            self.save(trainer)

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        # Lightning raises this one between steps, where the state is whole. Any other exception
        # may come from the middle of a step.
        if isinstance(exception, SIGTERMException):
            self.save_and_say(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.global_step < trainer.max_steps:  # such as at trainer.max_time
            self.save_between(trainer)

    def save_and_say(self, trainer: Trainer) -> None:
        """Write a checkpoint as `save_between`, where the ranks agree on the step, and say what
        the same command goes on from."""
        self.save_between(trainer)
        if not trainer.is_global_zero:
            return
        kept = checkpoint_step(self.path.parent)
        log.warning(
            "stopped at step %s of %s: %s",
            f"{trainer.global_step:,}",
            f"{trainer.max_steps:,}",
            "there is no checkpoint yet"
            if kept is None
            else f"the checkpoint of step {kept:,} is in {self.path.parent}; the same command goes "
            "on from there",
        )

    def save_between(self, trainer: Trainer) -> None:
        """Write a checkpoint, unless the newest is as new, or gradients are being accumulated."""
        if not self.accumulating and trainer.global_step != self.last_step:
            self.save(trainer)

    def save(self, trainer: Trainer) -> None:
        """Write a checkpoint; between two steps, on every rank."""
        self.last_step, self.last_time = trainer.global_step, time.monotonic()
        aside = self.path.with_suffix(".tmp")
        try:
            trainer.save_checkpoint(aside)
            if trainer.is_global_zero:
                put_checkpoint(aside, self.path, trainer.global_step)
        except BaseException:
            if trainer.is_global_zero:  # half of it: the disk may be full
                aside.unlink(missing_ok=True)
            raise


class ReportProgress(Callback):
    """Tells `report(done, total)` after every step how far the training is.

    Args:
        report: such as `Stage.progress`; what it raises ends the training.
    """

    def __init__(self, report: Callable[[int, int], None]) -> None:
        self.report = report

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        self.report(trainer.global_step, trainer.max_steps)


class TokenRate(Callback):
    """Logs `train/tokens_per_second` since the last time, validation and checkpoints left out."""

    def __init__(self) -> None:
        self.tokens = 0
        self.seconds = 0.0
        self.started = 0.0

    def on_train_batch_start(self, trainer: Trainer, *args: Any) -> None:
        if self.started == 0.0:
            self.started = time.perf_counter()

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: torch.Tensor,
        *_: Any,
    ) -> None:
        now = time.perf_counter()
        self.seconds += now - self.started
        self.started = now
        self.tokens += batch.shape[0] * batch.shape[1] * trainer.world_size
        if trainer.global_step % trainer.log_every_n_steps == 0 and self.seconds > 0:
            pl_module.log("train/tokens_per_second", self.tokens / self.seconds)
            self.tokens, self.seconds = 0, 0.0

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.started = 0.0


class BusyCores(Callback):
    """Warns once where torch's threads share their cores with other processes: threads that wait
    for each other take many times as long as one alone. How many there are is the user's to
    choose: another number adds in another order, and is another result."""

    def __init__(self) -> None:
        self.warned = False

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        if self.warned or trainer.global_step % trainer.log_every_n_steps:
            return
        threads, cores = torch.get_num_threads(), os.cpu_count() or 1
        load = os.getloadavg()[0]
        # Its own threads are a part of the load.
        if pl_module.device.type == "cpu" and threads > 1 and load > threads + cores / 2:
            self.warned = True
            log.warning(
                "this machine is busy (load %.1f on %d cores) and torch uses %d threads: with "
                "OMP_NUM_THREADS=1 a step may take a tenth of the time",
                *(load, cores, threads),
            )


class StepProgress(Callback):
    """One bar over all steps of the training with the few numbers that one watches.

    (Lightning's own bars run over epochs: of two epochs of 40,000 steps each, the end is never
    in sight.)

    Args:
        name: of the training.
    """

    SHOWN = ("fvu", "l0", "dead_fraction", "tokens_per_second")

    def __init__(self, name: str) -> None:
        self.bar = Bar(f"training {name}")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero:
            self.bar(trainer.global_step, trainer.max_steps)

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        if not trainer.is_global_zero:
            return
        numbers = None
        if trainer.global_step % trainer.log_every_n_steps == 0:
            values = trainer.callback_metrics
            numbers = "  ".join(
                f"{name.replace('_', ' ')} {float(values[f'train/{name}']):.3g}"
                for name in self.SHOWN
                if f"train/{name}" in values
            )
        self.bar(trainer.global_step, trainer.max_steps, numbers)

    def on_exception(self, *args: Any) -> None:
        self.bar.close()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.bar.close()

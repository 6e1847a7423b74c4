"""What happens around the steps: the checkpoint that a killed run continues from, the speed, the
progress line."""

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, Checkpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)

from clipsae.store import put_checkpoint

log = logging.getLogger(__name__)


class BetweenSteps(Callback):
    """Calls `between_steps` after every optimizer step; where held-out images are looked at after
    it, after that look, which a run that goes on from a checkpoint does not repeat."""

    _seen = -1

    def between_steps(self, trainer: Trainer) -> None:
        raise NotImplementedError

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._seen = trainer.global_step

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        if not _looks_next(trainer):
            self._call(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._call(trainer)

    def _call(self, trainer: Trainer) -> None:
        if trainer.global_step != self._seen:  # not in the middle of an accumulated batch
            self._seen = trainer.global_step
            self.between_steps(trainer)


def _looks_next(trainer: Trainer) -> bool:
    """Whether held-out images are looked at before the next batch."""
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
        every_n_seconds: a checkpoint at least this often, too; the time is looked at between
            steps, and does not change what is trained.
    """

    def __init__(
        self, path: Path, every_n_steps: int = 500, every_n_seconds: float = 300.0
    ) -> None:
        if every_n_steps < 1:
            raise ValueError(f"every_n_steps={every_n_steps}: expected 1 or more")
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
            self.save_between(trainer)

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
    """Logs `train/tokens_per_second` between two looks, validation and checkpoints left out."""

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


class StepProgress(Callback):
    """One bar over all steps of the training with the few numbers that one watches; where there
    is no terminal, a line every now and then instead. Trainings that take turns have a bar each,
    one below the other.

    (Lightning's own bars run over epochs: of two epochs of 40,000 steps each, the end is never
    in sight.)

    Args:
        name: of the training.
    """

    SHOWN = ("fvu", "active", "dead_fraction", "tokens_per_second")
    SECONDS_BETWEEN_LINES = 30.0
    display: ClassVar[Progress | None] = None  # a terminal has place for one

    def __init__(self, name: str) -> None:
        self.name = name
        self.bar: Progress | None = None
        self.task = TaskID(0)
        self.last_line = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        self.bar = StepProgress.display or Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[numbers]}"),
            refresh_per_second=4,
        )
        StepProgress.display = self.bar
        self.task = self.bar.add_task(
            self.name, total=trainer.max_steps, completed=trainer.global_step, numbers=""
        )
        self.last_line = time.monotonic()
        if self.bar.console.is_terminal:
            self.bar.start()

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        if self.bar is None:
            return
        step = trainer.global_step
        if step % trainer.log_every_n_steps:
            self.bar.update(self.task, completed=step)
            return
        values = trainer.callback_metrics
        numbers = "  ".join(
            f"{name.replace('_', ' ')} {float(values[f'train/{name}']):.3g}"
            for name in self.SHOWN
            if f"train/{name}" in values
        )
        self.bar.update(self.task, completed=step, numbers=numbers)
        late = time.monotonic() - self.last_line > self.SECONDS_BETWEEN_LINES
        if not self.bar.console.is_terminal and (late or step == trainer.max_steps):
            self.last_line = time.monotonic()
            log.info("%s: step %d of %d  %s", self.name, step, trainer.max_steps, numbers)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self.bar is None:
            return
        self.bar.stop_task(self.task)
        if all(task.stop_time is not None for task in self.bar.tasks):
            self.bar.stop()
            StepProgress.display = None
        self.bar = None

"""What happens around the steps of a `SAEGroup`: checkpoints, also when a signal comes, the speed,
the progress line."""

import logging
import os
import signal
import time
from typing import Any

import torch
from lightning import Trainer
from lightning.pytorch.callbacks import Callback, Checkpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException

from clipsae.data.loader import Batch, tensors
from clipsae.store import put_checkpoint
from clipsae.store.files import checkpoint_step
from clipsae.training.module import SAEGroup, SAEModule

log = logging.getLogger(__name__)


class Checkpoints(Checkpoint):
    """Keeps one checkpoint of each SAE, the newest whole one: `SAEModule.checkpoint`.

    Lightning's own writes through a temporary file that may lie on another file system, from
    where a move is a copy: a kill in the middle leaves half a file under the final name. Here it
    is written beside its place, flushed to disk, renamed, and its checksum noted, by which
    `whole_checkpoint` knows a damaged one.

    All is done between two steps, and after the validation that follows a step, so that a run that
    continues from a checkpoint does not repeat it. So are signals answered:

    - Ctrl-C (SIGINT): checkpoint, then the training ends. A second one ends it at once.
    - SIGTERM: Lightning ends the training between two steps, and a checkpoint is written.

    Where SIGUSR2 has a handler (submitit, which then queues the job again):

    - SIGUSR2, the job's time is nearly over or it is preempted: checkpoint, then submitit.
    - SIGTERM in a SLURM job comes with a requeue, a preemption or scancel: checkpoint, and on until
      SIGKILL. A job that ended by itself would count as over, and would not be queued again.

    With several ranks no signal arrives between the same two steps everywhere: there the last
    regular checkpoint counts.

    Args:
        every_n_steps: optimizer steps between checkpoints.
        every_n_seconds: a checkpoint at least this often, too; the time is checked between
            steps, and does not change what is trained.
    """

    def __init__(self, every_n_steps: int = 500, every_n_seconds: float = 300.0) -> None:
        if every_n_steps < 1:
            raise ValueError(f"every_n_steps={every_n_steps}: must be at least 1")
        self.every_n_steps = every_n_steps
        self.every_n_seconds = every_n_seconds
        self.last_time = time.monotonic()
        self.saved: dict[SAEModule, int] = {}  # batches in the newest checkpoint
        self.asked: set[int] = set()
        self.before: dict[int, Any] = {}

    def on_train_start(self, trainer: Trainer, pl_module: SAEGroup) -> None:
        self.last_time = time.monotonic()
        self.saved = {member: member.batches for member in pl_module.members}
        answered = [signal.SIGINT]
        if callable(signal.getsignal(signal.SIGUSR2)):
            if "SLURM_JOB_ID" in os.environ:
                answered.append(signal.SIGTERM)
            if trainer.world_size == 1:
                answered.append(signal.SIGUSR2)
        self.before = {number: signal.signal(number, self._note) for number in answered}

    def on_train_batch_end(self, trainer: Trainer, pl_module: SAEGroup, *args: Any) -> None:
        every = trainer.val_check_batch
        validates = trainer.enable_validation and every is not None
        if not (validates and (trainer.fit_loop.total_batch_idx + 1) % every == 0):
            self.between_steps(trainer, pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: SAEGroup) -> None:
        self.between_steps(trainer, pl_module)

    def between_steps(self, trainer: Trainer, group: SAEGroup) -> None:
        """Write the checkpoints that are due, and answer signals."""
        late = time.monotonic() - self.last_time >= self.every_n_seconds
        if late and trainer.world_size == 1:  # ranks would not agree on the time
            self.save(trainer, group)
        group.each(lambda member: self._save_if_due(trainer, group, member))
        asked, self.asked = self.asked, set()
        if not asked:
            return
        if trainer.world_size == 1:
            self.save(trainer, group)
        if signal.SIGINT in asked:
            self.say_where(trainer, group)
            raise KeyboardInterrupt
        self._pass_on(asked)

    def _save_if_due(self, trainer: Trainer, group: SAEGroup, member: SAEModule) -> None:
        # One that has ended before the others would otherwise train again after a kill.
        waits = member.done and len(group.members) > 1
        if not member.accumulating and (member.step % self.every_n_steps == 0 or waits):
            self._save(trainer, member)

    def save(self, trainer: Trainer, group: SAEGroup) -> None:
        """Write a checkpoint of each SAE; between two steps, on every rank."""
        self.last_time = time.monotonic()
        group.each(lambda member: self._save(trainer, member))

    def _save(self, trainer: Trainer, member: SAEModule) -> None:
        if self.saved.get(member) == member.batches:
            return
        state = {**member.training_state(), "stream": trainer.train_dataloader.state_dict()}
        if trainer.is_global_zero:
            path = member.checkpoint
            path.parent.mkdir(parents=True, exist_ok=True)
            aside = path.with_suffix(".tmp")
            try:
                torch.save(state, aside)
                put_checkpoint(aside, path, member.step)
            except BaseException:  # half of it: the disk may be full
                aside.unlink(missing_ok=True)
                raise
        trainer.strategy.barrier()
        self.saved[member] = member.batches

    def say_where(self, trainer: Trainer, group: SAEGroup) -> None:
        """Say from which step of each SAE the same command continues."""
        for member in group.current if trainer.is_global_zero else ():
            kept = checkpoint_step(member.checkpoint.parent)
            log.warning(
                "%s stopped at step %s of %s: %s",
                member.name,
                f"{member.step:,}",
                f"{member.max_steps:,}",
                "there is no checkpoint yet"
                if kept is None
                else f"the checkpoint of step {kept:,} is in {member.checkpoint.parent}; the same "
                "command goes on from there",
            )

    def on_exception(self, trainer: Trainer, pl_module: SAEGroup, exception: BaseException) -> None:
        self._restore()
        # Lightning raises this one between steps, where the state is whole. Any other exception
        # may come from the middle of a step.
        if isinstance(exception, SIGTERMException):
            self.save(trainer, pl_module)
            self.say_where(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: SAEGroup) -> None:
        # Those that ended early, such as at trainer.max_time.
        pl_module.each(lambda member: member.done or self._save(trainer, member))
        self._pass_on(self.asked)
        self._restore()

    def _note(self, number: int, frame: Any) -> None:
        self.asked.add(number)
        if number == signal.SIGINT:
            log.warning("Ctrl-C: saving after this step; press it again to stop at once")
            signal.signal(number, self.before[number])

    def _pass_on(self, asked: set[int]) -> None:
        if signal.SIGUSR2 in asked:
            self.before[signal.SIGUSR2](signal.SIGUSR2, None)

    def _restore(self) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)
        self.before = {}


class TokenRate(Callback):
    """Records `train/tokens_per_second`, validation and checkpoints left out."""

    def __init__(self) -> None:
        self.tokens = 0
        self.seconds = 0.0
        self.started = 0.0

    def on_train_batch_start(self, trainer: Trainer, *args: Any) -> None:
        if self.started == 0.0:
            self.started = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: SAEGroup, outputs: Any, batch: Batch, *_: Any
    ) -> None:
        now = time.perf_counter()
        self.seconds += now - self.started
        self.started = now
        images, tokens, _ = next(tensors(batch)).shape
        self.tokens += images * tokens * trainer.world_size
        every = trainer.log_every_n_steps
        due = [m for m in pl_module.current if not m.accumulating and m.step % every == 0]
        for member in due:
            member.record({"train/tokens_per_second": self.tokens / self.seconds})
        if due:
            self.tokens, self.seconds = 0, 0.0

    def on_validation_end(self, trainer: Trainer, pl_module: SAEGroup) -> None:
        self.started = 0.0


class BusyCores(Callback):
    """Warns once where torch's threads share their cores with other processes: threads that wait
    for each other take many times as long as one alone. How many there are is the user's to
    choose: another number adds in another order, and is another result."""

    def __init__(self) -> None:
        self.warned = False

    def on_train_batch_end(self, trainer: Trainer, pl_module: SAEGroup, *args: Any) -> None:
        if self.warned or (trainer.fit_loop.total_batch_idx + 1) % trainer.log_every_n_steps:
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
    """Reports after every batch how far each SAE is, and now and then the few numbers that one
    watches.

    (Lightning's own bars run over epochs: of two epochs of 40,000 steps each, the end is never
    in sight.)
    """

    SHOWN = ("fvu", "l0", "dead_fraction", "tokens_per_second")

    def on_train_start(self, trainer: Trainer, pl_module: SAEGroup) -> None:
        for member in pl_module.members:
            member.progress(member.step, member.max_steps, None)

    def on_train_batch_end(self, trainer: Trainer, pl_module: SAEGroup, *args: Any) -> None:
        pl_module.each(lambda member: self._report(member, trainer.log_every_n_steps))

    def _report(self, member: SAEModule, every: int) -> None:
        numbers = None
        if member.step % every == 0:
            numbers = "  ".join(
                f"{name.replace('_', ' ')} {member.numbers[f'train/{name}']:.3g}"
                for name in self.SHOWN
                if f"train/{name}" in member.numbers
            )
        member.progress(member.step, member.max_steps, numbers)

"""What SLURM's signals mean to a training: first a checkpoint, between two steps."""

import signal
from collections.abc import Callable
from typing import Any

from lightning import LightningModule, Trainer

from clipsae.training.callbacks import BetweenSteps


class CheckpointOnSignal(BetweenSteps):
    """Where someone listens to SIGUSR2 (submitit, which then queues the job again), SIGTERM and
    SIGUSR2 are answered at the end of the step, with a checkpoint.

    - SIGUSR2, the job's time is nearly over or its place is wanted: checkpoint, then submitit.
    - SIGTERM comes with a requeue, a preemption or scancel: checkpoint, and on until SIGKILL. A
      job that ended by itself would count as over, and would not be queued again.

    With several ranks no signal arrives between the same two steps everywhere: there the last
    regular checkpoint counts.

    Args:
        save: writes a checkpoint.
    """

    def __init__(self, save: Callable[[Trainer], None]) -> None:
        self.save = save
        self.asked: set[int] = set()
        self.before: dict[int, Any] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        if not callable(signal.getsignal(signal.SIGUSR2)):
            return
        self.before = {signal.SIGTERM: signal.signal(signal.SIGTERM, self._note)}
        if trainer.world_size == 1:
            self.before[signal.SIGUSR2] = signal.signal(signal.SIGUSR2, self._note)

    def _note(self, number: int, frame: Any) -> None:
        self.asked.add(number)

    def between_steps(self, trainer: Trainer) -> None:
        if self.asked:
            if trainer.world_size == 1:
                self.save(trainer)
            self._pass_on()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._pass_on()
        self._restore()

    def on_exception(self, *args: Any) -> None:
        self._restore()

    def _pass_on(self) -> None:
        asked, self.asked = self.asked, set()
        if signal.SIGUSR2 in asked:
            self.before[signal.SIGUSR2](signal.SIGUSR2, None)

    def _restore(self) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)
        self.before = {}

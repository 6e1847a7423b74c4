"""What signals mean to a training: first a checkpoint, between two steps."""

import logging
import signal
from typing import Any

from lightning import LightningModule, Trainer

from clipsae.training.callbacks import BetweenSteps, ResumeCheckpoint

log = logging.getLogger(__name__)


class CheckpointOnSignal(BetweenSteps):
    """Answers signals at the end of the step.

    - Ctrl-C (SIGINT): checkpoint, then the training ends. A second one ends it at once.
    - SIGTERM: Lightning ends the training between two steps, and `ResumeCheckpoint` saves.

    Where someone listens to SIGUSR2 (submitit, which then queues the job again):

    - SIGUSR2, the job's time is nearly over or its place is wanted: checkpoint, then submitit.
    - SIGTERM comes with a requeue, a preemption or scancel: checkpoint, and on until SIGKILL. A
      job that ended by itself would count as over, and would not be queued again.

    With several ranks no signal arrives between the same two steps everywhere: there the last
    regular checkpoint counts.

    Args:
        checkpoint: writes it.
    """

    def __init__(self, checkpoint: ResumeCheckpoint) -> None:
        self.checkpoint = checkpoint
        self.asked: set[int] = set()
        self.before: dict[int, Any] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        answered = [signal.SIGINT]
        if callable(signal.getsignal(signal.SIGUSR2)):
            answered.append(signal.SIGTERM)
            if trainer.world_size == 1:
                answered.append(signal.SIGUSR2)
        self.before = {number: signal.signal(number, self._note) for number in answered}

    def _note(self, number: int, frame: Any) -> None:
        self.asked.add(number)
        if number == signal.SIGINT:
            log.warning("Ctrl-C: saving after this step; once more ends it at once")
            signal.signal(number, self.before[number])

    def between_steps(self, trainer: Trainer) -> None:
        if not self.asked:
            return
        if signal.SIGINT in self.asked:
            if trainer.world_size == 1:
                self.checkpoint.save_and_say(trainer)
            raise KeyboardInterrupt
        if trainer.world_size == 1:
            self.checkpoint.save(trainer)
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

"""`together=true`: the cells of a sweep that train on the same tokens run in one process.

Each cell runs as it does alone, in a thread of its own, and one thread at a time. Where one piece
of work serves several cells (the tokens of a batch, a pass over the evaluated images), a cell says
what it needs and waits. When all wait, what comes first is made once, for all who need it. So a
cell's results do not depend on its neighbours: whether they begin, end or fail with it, or at which
steps they were interrupted.
"""

import json
import logging
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig
from torch import Tensor

from clipsae.data import FeatureDataModule
from clipsae.store import Busy, Stage
from clipsae.tasks import build

log = logging.getLogger(__name__)

# What is made first where cells need different things.
TRAIN, RETRY, EVALUATE, WAIT = range(4)
POLL_SECONDS = 2.0  # between two checks of what another process makes

_this = threading.local()


@dataclass(frozen=True)
class Need:
    """What a cell waits for.

    Attributes:
        order: (one of TRAIN, ..., and what identifies it among those): the least is made
            first, equal ones are made at once.
        own: what the cell contributes.
        serve: makes it: the `own` of all cells that need it -> what each of them gets.
        save: writes a checkpoint, or None.
    """

    order: tuple[Any, ...]
    own: Any
    serve: Callable[[list[Any]], Sequence[Any]]
    save: Callable[[], None] | None = None


def stream_key(cfg: DictConfig) -> str:
    """The same for cells that train on the same tokens in the same order."""
    nodes = cfg.clip, cfg.train_dataset, cfg.features
    return json.dumps([*map(build.plain, nodes), cfg.seed, str(cfg.trainer.accelerator)])


def by_stream(configs: Sequence[DictConfig]) -> list[list[int]]:
    """The indices of configs that have a stream in common."""
    groups: dict[str, list[int]] = {}
    for i, cfg in enumerate(configs):
        groups.setdefault(stream_key(cfg), []).append(i)
    return list(groups.values())


def is_shared() -> bool:
    """Whether this cell has neighbours that it takes turns with."""
    return getattr(_this, "cell", None) is not None


def meet(need: Need) -> Any:
    """What is needed, made at once for all cells that need it; for a cell alone, right away."""
    if not is_shared():
        return need.serve([need.own])[0]
    return _this.cell.wait(need)


def source(
    open_stream: Callable[[], FeatureDataModule], save: Callable[[], None]
) -> Callable[[int, int], Tensor]:
    """The stream of tokens that the cells share, as one of them reads it.

    Args:
        open_stream: what streams them, where this cell is the first.
        save: writes the cell's checkpoint while it waits for a batch.
    """
    turns = _this.cell.turns
    turns.stream = turns.stream or open_stream()

    def tokens(epoch: int, position: int) -> Tensor:
        def serve(cells: list[Any]) -> list[Tensor]:
            return [turns.stream.tokens_at(epoch, position)] * len(cells)

        return meet(Need((TRAIN, epoch, position), None, serve, save))

    return tokens


def in_one_pass(
    kind: str, cfg: DictConfig, own: Any, run: Callable[[dict[str, Any]], Any]
) -> tuple[str, Any]:
    """One pass over the images of `cfg.dataset` for all SAEs that are due for it.

    Args:
        kind: what the pass is for; all have the config's evaluation and measurement in common.
        own: what this cell contributes.
        run: makes the pass, given each cell's `own` by a name.

    Returns:
        The name of this cell in the pass, and what `run` returned.
    """

    def serve(cells: list[Any]) -> list[tuple[str, Any]]:
        named = {str(i): cell for i, cell in enumerate(cells)}
        found = run(named)
        return [(name, found) for name in named]

    nodes = cfg.clip, cfg.dataset, cfg.evaluation, cfg.measurement
    common = [build.plain(node) for node in nodes]
    for options in common:
        options.pop("count_threshold", None)  # each cell's own
    key = json.dumps([*common, build.limit_images(cfg)])
    return meet(Need((EVALUATE, kind, key), own, serve))


def make(stage: Stage, build: Callable[[Path], None], rank: int = 0) -> Path:
    """`stage.make`, but while another cell or process makes it, this cell's neighbours go on."""
    if not is_shared():
        return stage.make(build, rank=rank)

    def pause(cells: list[Any]) -> list[Any]:
        time.sleep(POLL_SECONDS)
        return cells

    need = Need((RETRY,), None, list)
    while True:
        try:
            return stage.make(build, wait=False)
        except Busy:
            if need.order == (RETRY,):
                log.info("%s is being made already: waiting for it", stage.path.name)
            meet(need)
            need = Need((WAIT,), None, pause)


class Turns:
    """Runs cells that take turns.

    SIGTERM and Ctrl-C: every cell ends between two of its steps, with a checkpoint. Where SIGUSR2
    has a handler, all write checkpoints, as `training.signals` says; the work then goes on, and
    SIGUSR2 is passed on.
    """

    def __init__(self) -> None:
        self.stream: FeatureDataModule | None = None
        self.back = threading.Semaphore(0)  # released when a turn is over
        self.asked: set[int] = set()

    def run(self, jobs: Sequence[Callable[[], Any]]) -> list[Any]:
        """Run jobs to their ends, and return what they return.

        Raises:
            BaseException: what a job raised, the first, when all have ended.
            SystemExit: after SIGTERM (status 143) or Ctrl-C (130).
        """
        cells = [_Cell(self, job) for job in jobs]
        with self._listening() as pass_on, _kept():
            try:
                while living := [cell for cell in cells if not cell.over]:
                    for cell in living:
                        if cell.can_go and not self.asked:
                            cell.turn()
                    if self.asked:
                        self._answer(cells, pass_on)
                    else:
                        self._serve([cell for cell in living if not cell.over])
                if self.asked:
                    self._answer(cells, pass_on)
            except KeyboardInterrupt:  # at once
                raise SystemExit(128 + signal.SIGINT) from None
            except SystemExit:
                for cell in cells:
                    cell.leave()
                raise
            finally:
                self._rest()
        for cell in cells:
            if cell.error is not None:
                raise cell.error
        return [cell.result for cell in cells]

    def _serve(self, waiting: list["_Cell"]) -> None:
        """Make what comes first, for all who need it."""
        if not waiting:
            return
        first = min((cell.need for cell in waiting), key=lambda need: need.order)
        some = [cell for cell in waiting if cell.need.order == first.order]
        if first.order[0] != TRAIN:
            self._rest()
        self._give(some)

    def _give(self, some: list["_Cell"]) -> None:
        try:
            given = some[0].need.serve([cell.need.own for cell in some])
        except Exception as error:
            if len(some) == 1:
                some[0].give(error=error)
            else:  # one may be at fault, or all together too large
                for cell in some:
                    self._give([cell])
        else:
            for cell, its in zip(some, given, strict=True):
                cell.give(its)

    def _rest(self) -> None:
        """End the processes that read images; they are started again where a training goes on."""
        if self.stream is not None:
            self.stream.teardown("fit")

    def _answer(self, cells: list["_Cell"], pass_on: Callable[[int], None] | None) -> None:
        """Answer the signals, now that every cell is between two steps."""
        asked, self.asked = self.asked, set()
        if pass_on is not None and signal.SIGINT not in asked:
            for cell in cells:
                cell.save()
            if signal.SIGUSR2 in asked:
                pass_on(signal.SIGUSR2)
            return
        if signal.SIGINT in asked:
            log.warning("interrupted: the same command goes on from the last checkpoints")
        raise SystemExit(128 + min(asked))

    @contextmanager
    def _listening(self) -> Iterator[Callable[[int], None] | None]:
        """Note signals; a second one of a kind has its usual effect."""
        before: dict[int, Any] = {}

        def note(number: int, frame: Any) -> None:
            self.asked.add(number)
            if number == signal.SIGINT:
                log.warning("Ctrl-C: saving between two steps; once more ends it at once")
            if number == signal.SIGINT or not listener:
                signal.signal(number, before[number])

        listener = callable(signal.getsignal(signal.SIGUSR2))
        for number in (signal.SIGTERM, signal.SIGINT, *([signal.SIGUSR2] if listener else [])):
            before[number] = signal.signal(number, note)
        try:
            yield (lambda number: before[number](number, None)) if listener else None
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


class _Cell:
    """A job in a thread of its own, that runs when it is its turn."""

    def __init__(self, turns: Turns, job: Callable[[], Any]) -> None:
        self.turns = turns
        self.job = job
        self.go = threading.Semaphore(0)
        self.can_go = True
        self.over = False
        self.result: Any = None
        self.error: BaseException | None = None
        self.need: Need | None = None  # that it waits for
        self.answer: Callable[[], Any] | None = None  # to that
        self.errand: Callable[[], None] | None = None  # while it waits
        self.thread = threading.Thread(target=self._run, daemon=True)

    # --- in the main thread ---

    def turn(self) -> None:
        """Let it run until it waits again or is over."""
        if self.thread.ident is None:
            self.thread.start()
        self.go.release()
        self.turns.back.acquire()

    def give(self, its: Any = None, error: BaseException | None = None) -> None:
        """What it waited for, or why it cannot have it."""
        self.can_go = True
        self.answer = (lambda: its) if error is None else (lambda: _raise(error))

    def save(self) -> None:
        """Let it write a checkpoint, if it is training; it goes on waiting."""
        if self.need is not None and self.need.save is not None:
            self.errand = self.need.save
            self.turn()

    def leave(self) -> None:
        """End it as SIGTERM ends a job that is alone."""
        from lightning.pytorch.utilities.exceptions import SIGTERMException

        if self.thread.ident is not None and not self.over:
            self.give(error=SIGTERMException())
            self.turn()

    # --- in its own ---

    def _run(self) -> None:
        self.go.acquire()
        _this.cell = self
        try:
            self.result = self.job()
        except BaseException as error:
            self.error = error
        finally:
            self.over, self.need = True, None
            self.turns.back.release()

    def wait(self, need: Need) -> Any:
        """End this turn, until what is needed is there."""
        from lightning.pytorch.utilities.seed import isolate_rng

        self.need, self.can_go = need, False
        while True:
            with _kept(), isolate_rng():
                self.turns.back.release()
                self.go.acquire()
            if self.errand is None:
                answer, self.answer, self.need = self.answer, None, None
                return answer()
            errand, self.errand = self.errand, None
            errand()


def _raise(error: BaseException) -> None:
    raise error


@contextmanager
def _kept() -> Iterator[None]:
    """A job's own config and log, which Hydra keeps in global places, whatever others do there."""
    config, handlers = HydraConfig.instance().cfg, logging.root.handlers[:]
    try:
        yield
    finally:
        HydraConfig.instance().cfg = config
        logging.root.handlers[:] = handlers

"""One process's wait for the lease of one stage."""

import logging
import random
import time
from pathlib import Path
from typing import Literal

from clipsae.errors import ConfigError
from clipsae.store import lease
from clipsae.store.lease import FREE, Lease, Watch

log = logging.getLogger(__name__)

REMIND = 300.0  # seconds between two lines of who is waited for
LOOKS = (0.05, 5.0)  # seconds between two looks while waiting: at first, in the end
STRAYS = 20  # looks at a home without a slot before it counts as not ours

OnBusy = Literal["wait", "skip", "fail"]


class StoreError(ConfigError):
    """The store cannot do what it should, in one sentence that says how to go on."""


class Busy(StoreError):
    """Another process is making the stage, and `on_busy` says not to wait."""


class BusySkip(Busy):
    """The same under `on_busy="skip"`: no failure."""


class Queue:
    """One process's wait for one stage.

    Args:
        path, home: of the stage.
        beat, dead_after: of the lease, in seconds.
        on_busy: see `Stage.make`.
    """

    def __init__(
        self, path: Path, home: Path, beat: float, dead_after: float, on_busy: OnBusy
    ) -> None:
        if on_busy not in ("wait", "skip", "fail"):
            raise ValueError(f"on_busy={on_busy!r}: expected wait, skip or fail")
        self.path = path
        self.home = home
        self.beat = beat
        self.on_busy = on_busy
        self.watch = Watch(dead_after)
        self.said = ("", 0.0)  # the slot that was named, and when
        self.looks = 0
        self.strays = 0

    def look(self) -> Lease | None:
        """The lease where it can be had; None where it cannot now."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        slot = lease.find_slot(self.home)
        if slot is None:
            begun = lease.begin(self.home, self.beat)
            self.strays = 0 if begun or lease.find_slot(self.home) else self.strays + 1
            if self.strays > STRAYS:
                raise StoreError(
                    f"{self.home}: expected the folder of an unfinished stage, found other "
                    "files: remove it"
                )
            return begun
        if self.alive(slot):
            return None
        owner = lease.owner_of(slot)
        taken = lease.take(slot, self.beat)
        if taken and slot.name != FREE:
            log.info("%s was left by %s: taking over", self.path.name, owner)
        return taken

    def alive(self, slot: Path) -> bool:
        """Whether the slot's owner may be alive. Says who is waited for, now and then.

        Raises:
            Busy: it is alive, and `on_busy` says not to wait.
        """
        alive = self.watch.alive(slot)
        if alive is False:
            return False
        owner = lease.owner_of(slot) or "another process"
        if alive and self.on_busy != "wait":
            kind = BusySkip if self.on_busy == "skip" else Busy
            raise kind(
                f"{self.path.name} is being made by {owner}: run again later, or set on_busy=wait"
            )
        name, when = self.said
        if name != slot.name or time.monotonic() - when > REMIND:
            self.said = (slot.name, time.monotonic())
            log.info("waiting for %s: made by %s", self.path.name, owner)
        return True

    def pause(self) -> None:
        """Sleep before the next look; longer each time, so that a hundred jobs are no burden."""
        first, last = LOOKS
        time.sleep(min(first * 1.3**self.looks, last) * random.uniform(0.8, 1.2))
        self.looks = min(self.looks + 1, 40)

"""Who is making a stage: a lease that holds between machines that share a file system, without
locks and without comparing clocks.

An unfinished stage is a home with one slot, and the slot's name says whose it is:

    .<name>.partial/<token>/    lease.json  about.json  failed.json  work/  scratch/

Every change of hands is one rename, which the file system does once or not at all:

- begin     a prepared home is renamed into its place; it fails where one is
- take over <old token> -> <new token>; of several that try, all but one find it gone
- release   <token> -> free
- publish   <token>/work -> the finished folder

Tokens are never used twice. So an owner that was taken for dead and wakes up can do no harm: its
paths are gone, its writes and its publishing fail.

The owner rewrites `lease.json` every `beat` seconds. Others take it for dead when they have seen
no change for `dead_after` seconds of their own monotonic clock; at once where the token names a
process of this machine that has ended, or an earlier run of the same SLURM job.
"""

import contextlib
import errno
import json
import os
import platform
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clipsae.store.files import read_json
from clipsae.store.identity import (
    TOKEN,
    lives_here,
    machine,
    new_token,
    process_group,
    slurm_job,
)

FREE = "free"
LEASE = "lease.json"
TAKEN = (errno.ENOENT, errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR)


class LeaseLost(Exception):
    """This process stood still for so long that another took its work over."""


@dataclass(frozen=True)
class Owner:
    """Who holds a slot, as a person wants to read it.

    Attributes:
        host, pid: the process.
        job: its SLURM job ("123" or "123_4"), or None.
        since: local date and time on that host; shown, never compared.
        done, total: how far it is, in steps, or None.
    """

    host: str
    pid: int
    job: str | None
    since: str
    done: int | None = None
    total: int | None = None

    def __str__(self) -> str:
        job = f", SLURM job {self.job}" if self.job else ""
        far = "" if self.done is None else f", step {self.done:,} of {self.total:,}"
        return f"{self.host} (process {self.pid}{job}) since {self.since}{far}"


class Lease:
    """The slot of this process, kept by a thread until it is released or lost.

    Args:
        slot: the folder that a rename has just given to this process.
        beat: seconds between two rewritings of `lease.json`.
    """

    def __init__(self, slot: Path, beat: float) -> None:
        self.slot = slot
        self.lost = False
        self._beats = 0
        self._progress: tuple[int | None, int | None] = (None, None)
        env = os.environ
        self._owner = {
            "token": slot.name,
            "host": platform.node(),
            "pid": os.getpid(),
            "job": slurm_job(),
            "job_id": env.get("SLURM_JOB_ID"),
            "restart": int(env.get("SLURM_RESTART_COUNT", 0)),
            "group": process_group(),
            "since": time.strftime("%Y-%m-%d %H:%M:%S"),
        }
        self._write()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._keep, args=(beat,), daemon=True)
        self._thread.start()

    def progress(self, done: int, total: int) -> None:
        """Say how far the work is; it is written with the next beat.

        Raises:
            LeaseLost: another has taken over.
        """
        self._progress = (done, total)
        if self.lost:
            raise LeaseLost(self.slot.parent.name)

    def release(self) -> None:
        """Leave the slot to whoever comes next."""
        self.stop()
        with contextlib.suppress(OSError):
            self.slot.rename(self.slot.with_name(FREE))

    def discard(self) -> None:
        """Remove the slot, which nobody needs any more."""
        self.stop()
        shutil.rmtree(self.slot, ignore_errors=True)
        with contextlib.suppress(OSError):
            self.slot.parent.rmdir()

    def stop(self) -> None:
        """End the heartbeat, with a last word on how far the work was."""
        self._ended.set()
        self._thread.join(timeout=5)
        self._write()

    def _keep(self, beat: float) -> None:
        while not self._ended.wait(beat):
            self._write()

    def _write(self) -> None:
        self._beats += 1
        done, total = self._progress
        content = {**self._owner, "beat": self._beats, "done": done, "total": total}
        path, aside = self.slot / LEASE, self.slot / f".{LEASE}.tmp"
        try:
            aside.write_text(json.dumps(content))
            aside.replace(path)
        except OSError:
            # On a full disk a new time stamp is a sign of life, too; without the slot none is.
            try:
                os.utime(path)
            except OSError:
                self.lost = not self.slot.exists()


class Watch:
    """Judges whether the owners of slots are alive by what it sees itself.

    Args:
        dead_after: seconds without a change after which an owner counts as dead.
        clock: seconds that never go back.
    """

    def __init__(self, dead_after: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.dead_after = dead_after
        self.clock = clock
        self._seen: dict[str, tuple[Any, float, int]] = {}

    def alive(self, slot: Path) -> bool | None:
        """True: a sign of life was seen. False: dead, or free. None: not known yet."""
        if surely_dead(slot):
            return False
        sign = _sign(slot)
        last, when, changes = self._seen.get(slot.name, (None, 0.0, -1))
        if changes < 0 or sign != last:
            when, changes = self.clock(), changes + 1
            self._seen[slot.name] = (sign, when, changes)
        if self.clock() - when > self.dead_after:
            return False
        return True if changes > 0 or lives_here(slot.name) else None


def surely_dead(slot: Path) -> bool:
    """Whether no waiting is needed to know that nobody works in a slot: it is free, its process
    was one of this machine and has ended, or it is an earlier run of this same SLURM job."""
    if slot.name == FREE:
        return True
    match = TOKEN.fullmatch(slot.name)
    if match and match["machine"] == machine():
        return not lives_here(slot.name)
    owner = read_json(slot / LEASE)
    job = os.environ.get("SLURM_JOB_ID")
    return (
        owner.get("token") == slot.name
        and job is not None
        and owner.get("job_id") == job
        and owner.get("restart", 0) < int(os.environ.get("SLURM_RESTART_COUNT", 0))
    )


def _sign(slot: Path) -> Any:
    """What changes with every beat."""
    path = slot / LEASE
    try:
        found = path.stat()
        return found.st_mtime_ns, found.st_ino, path.read_bytes()
    except OSError:
        return None


def owner_of(slot: Path) -> Owner | None:
    """Who holds a slot, or held it last; None where nothing was written."""
    lease = read_json(slot / LEASE)
    try:
        return Owner(*(lease[name] for name in ("host", "pid", "job", "since", "done", "total")))
    except KeyError:
        return None


def is_my_group(slot: Path) -> bool:
    """Whether a slot is held by the first rank of the distributed run that this process is in."""
    lease = read_json(slot / LEASE)
    if lease.get("token") != slot.name:
        return False
    if lease["group"] is not None and lease["group"] == process_group():
        return True
    return slot.name.startswith(f"{machine()}-{os.getppid()}-")


def find_slot(home: Path) -> Path | None:
    """The slot of an unfinished stage; None where there is none."""
    try:
        names = [path.name for path in home.iterdir()]
    except (FileNotFoundError, NotADirectoryError):
        return None
    slots = [name for name in names if name == FREE or TOKEN.fullmatch(name)]
    return home / slots[0] if slots else None


def begin(home: Path, beat: float) -> Lease | None:
    """Start a home with a slot of one's own; None where another was faster."""
    token = new_token()
    aside = home.with_name(f"{home.name}.{token}")
    (aside / token).mkdir(parents=True)
    if _rename(aside, home, home / token):
        return Lease(home / token, beat)
    shutil.rmtree(aside, ignore_errors=True)
    return None


def take(slot: Path, beat: float) -> Lease | None:
    """Take a slot whose owner is dead; None where another was faster."""
    mine = slot.with_name(new_token())
    return Lease(mine, beat) if _rename(slot, mine, mine) else None


def _rename(source: Path, target: Path, proof: Path) -> bool:
    """Rename; False where another was faster. A network file system may report a failure for a
    rename that it has done: whether `proof` exists decides."""
    try:
        source.rename(target)
    except OSError as error:
        if error.errno not in TAKEN:
            raise
        return proof.exists()
    return True

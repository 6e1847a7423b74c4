"""Who makes a stage: a lease that holds between machines that share a file system, without file
locks and without comparing clocks.

    .<name>.partial/<token>/    lease.json  about.json  failed.json  staging/  scratch/

The lease is a folder. Its name is the owner's token, or `free`, and every change of hands is one
rename, which the file system does once or not at all:

- begin     a prepared folder is renamed into its place; it fails where one is
- take      <old token> -> <new token>; of several that try, one succeeds
- release   <token> -> free
- publish   <token>/staging -> the finished folder

A token is used once. So an owner that was taken for dead and wakes up does no harm: its paths are
gone, its writes and its publishing fail.

The owner rewrites `lease.json` every `beat` seconds. Others take it for dead when they have seen
no change for `dead_after` seconds of their own monotonic clock; at once where the token names a
process of this machine that has ended, or an earlier run of the same SLURM job.
"""

import contextlib
import errno
import hashlib
import json
import os
import platform
import re
import secrets
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from clipsae.errors import ConfigError
from clipsae.store.files import read_json

FREE = "free"
LEASE = "lease.json"
TOKEN = re.compile(r"(?P<machine>[0-9a-f]{8})-(?P<pid>\d+)-(?P<born>\d+)-[0-9a-f]{16}")
TAKEN = (errno.ENOENT, errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR)
REMIND = 300.0  # seconds between two lines about who is waited for


class StoreError(ConfigError):
    """The store cannot do what it should, in one sentence that says how to go on."""


class LeaseLost(Exception):
    """This process stood still for so long that another took its work over."""


@dataclass(frozen=True)
class Owner:
    """Who holds a lease.

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
    """A lease of this process, kept by a thread until it is released or lost.

    Args:
        folder: what a rename has just given to this process.
        beat: seconds between two rewritings of `lease.json`.
    """

    def __init__(self, folder: Path, beat: float) -> None:
        self.folder = folder
        self.lost = False
        self._beats = 0
        self._progress: tuple[int | None, int | None] = (None, None)
        self._owner = {
            "token": folder.name,
            "host": platform.node(),
            "pid": os.getpid(),
            "job": slurm_job(),
            "job_id": os.environ.get("SLURM_JOB_ID"),
            "restart": int(os.environ.get("SLURM_RESTART_COUNT", 0)),
            "group": process_group(),
            "since": time.strftime("%Y-%m-%d %H:%M:%S"),
        }
        self._write()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._keep, args=(beat,), daemon=True)
        self._thread.start()

    def progress(self, done: int, total: int) -> None:
        """Note how far the work is; it is written with the next beat.

        Raises:
            LeaseLost: another process has taken over.
        """
        self._progress = (done, total)
        if self.lost:
            raise LeaseLost(self.folder.parent.name)

    def release(self) -> None:
        """Leave the folder to whoever comes next."""
        self.stop()
        with contextlib.suppress(OSError):
            self.folder.rename(self.folder.with_name(FREE))

    def discard(self) -> None:
        """Remove the folder, which nobody needs any more."""
        self.stop()
        shutil.rmtree(self.folder, ignore_errors=True)
        with contextlib.suppress(OSError):
            self.folder.parent.rmdir()

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
        path, aside = self.folder / LEASE, self.folder / f".{LEASE}.tmp"
        try:
            aside.write_text(json.dumps(content))
            aside.replace(path)
        except OSError:
            # On a full disk a new time stamp is a sign of life, too; without the folder none is.
            try:
                os.utime(path)
            except OSError:
                self.lost = not self.folder.exists()


class Watch:
    """Judges whether the owners of leases are alive by what it sees itself.

    Args:
        dead_after: seconds without a change after which an owner counts as dead.
        clock: seconds that never go back.
    """

    def __init__(self, dead_after: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.dead_after = dead_after
        self.clock = clock
        self._seen: dict[str, tuple[Any, float, int]] = {}
        self._said = ("", 0.0)

    def alive(self, folder: Path) -> bool | None:
        """True: a sign of life was seen. False: dead, or free. None: not known yet."""
        if surely_dead(folder):
            return False
        sign = _sign(folder)
        last, when, changes = self._seen.get(folder.name, (None, 0.0, -1))
        if changes < 0 or sign != last:
            when, changes = self.clock(), changes + 1
            self._seen[folder.name] = (sign, when, changes)
        if self.clock() - when > self.dead_after:
            return False
        return True if changes > 0 or lives_here(folder.name) else None

    def is_news(self, folder: Path) -> bool:
        """Whether it is time to say whose lease this is."""
        name, when = self._said
        if name == folder.name and self.clock() - when <= REMIND:
            return False
        self._said = (folder.name, self.clock())
        return True


def surely_dead(folder: Path) -> bool:
    """Whether no waiting is needed to know that nobody holds a lease: it is free, its process was
    one of this machine and has ended, or it is an earlier run of this same SLURM job."""
    if folder.name == FREE:
        return True
    match = TOKEN.fullmatch(folder.name)
    if match and match["machine"] == machine():
        return not lives_here(folder.name)
    owner = read_json(folder / LEASE)
    job = os.environ.get("SLURM_JOB_ID")
    return (
        owner.get("token") == folder.name
        and job is not None
        and owner.get("job_id") == job
        and owner.get("restart", 0) < int(os.environ.get("SLURM_RESTART_COUNT", 0))
    )


def _sign(folder: Path) -> Any:
    """What changes with every beat."""
    path = folder / LEASE
    try:
        found = path.stat()
        return found.st_mtime_ns, found.st_ino, path.read_bytes()
    except OSError:
        return None


def owner_of(folder: Path) -> Owner | None:
    """Who holds a lease, or held it last; None where nothing was written."""
    lease = read_json(folder / LEASE)
    try:
        return Owner(*(lease[name] for name in ("host", "pid", "job", "since", "done", "total")))
    except KeyError:
        return None


def is_my_group(folder: Path) -> bool:
    """Whether the first rank of the distributed run that this process is in holds a lease."""
    lease = read_json(folder / LEASE)
    if lease.get("token") != folder.name:
        return False
    if lease["group"] is not None and lease["group"] == process_group():
        return True
    return folder.name.startswith(f"{machine()}-{os.getppid()}-")


def find(partial: Path) -> Path | None:
    """The lease of an unfinished stage; None where there is none."""
    try:
        names = [path.name for path in partial.iterdir()]
    except (FileNotFoundError, NotADirectoryError):
        return None
    found = [name for name in names if name == FREE or TOKEN.fullmatch(name)]
    return partial / found[0] if found else None


def begin(partial: Path, beat: float) -> Lease | None:
    """Begin an unfinished stage with a lease of one's own; None where another was faster.

    Raises:
        StoreError: there are other files in its place.
    """
    token = new_token()
    aside = partial.with_name(f"{partial.name}.{token}")
    (aside / token).mkdir(parents=True)
    if _rename(aside, partial, partial / token):
        return Lease(partial / token, beat)
    shutil.rmtree(aside, ignore_errors=True)
    names = [path.name for path in partial.iterdir()] if partial.is_dir() else []
    if names and not any(name == FREE or TOKEN.fullmatch(name) for name in names):
        raise StoreError(f"{partial}: not a folder of an unfinished stage ({names[0]}): remove it")
    return None


def take(folder: Path, beat: float) -> Lease | None:
    """Take a lease whose owner is dead; None where another was faster."""
    mine = folder.with_name(new_token())
    return Lease(mine, beat) if _rename(folder, mine, mine) else None


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


# --- which machine and which process ---


@cache
def machine() -> str:
    """Eight hex digits for what shares our process ids: host, its boot, the pid namespace."""
    facts = [platform.node()]
    with contextlib.suppress(OSError):
        facts.append(Path("/proc/sys/kernel/random/boot_id").read_text())
        facts.append(Path("/proc/self/ns/pid").readlink().name)
    return hashlib.sha256("\n".join(facts).encode()).hexdigest()[:8]


def born(pid: int) -> int | None:
    """When a process of this machine started, in ticks since boot (0 where there is no /proc);
    None: it has ended."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        if Path("/proc/self/stat").exists():
            return None
        try:
            os.kill(pid, 0)
        except OSError as error:
            return None if isinstance(error, ProcessLookupError) else 0
        return 0
    state, *rest = text.rpartition(")")[2].split()
    return None if state in "ZX" else int(rest[18])


def new_token() -> str:
    """A name for one making of one stage by this process."""
    return f"{machine()}-{os.getpid()}-{born(os.getpid())}-{secrets.token_hex(8)}"


def lives_here(token: str) -> bool:
    """Whether a token's process is one of this machine that has not ended."""
    match = TOKEN.fullmatch(token)
    if match is None or match["machine"] != machine():
        return False
    return born(int(match["pid"])) == int(match["born"])


def process_group() -> str | None:
    """What the ranks of one distributed run have in common; None: unknown."""
    env = os.environ
    if "TORCHELASTIC_RUN_ID" in env:
        return f"{env['TORCHELASTIC_RUN_ID']}:{env.get('MASTER_PORT')}"
    if "SLURM_JOB_ID" in env and "SLURM_STEP_ID" in env:
        return f"{env['SLURM_JOB_ID']}.{env['SLURM_STEP_ID']}.{env.get('SLURM_RESTART_COUNT', 0)}"
    return None


def slurm_job() -> str | None:
    """This process's SLURM job as `squeue` shows it: "123", of an array "123_4"."""
    env = os.environ
    if "SLURM_ARRAY_JOB_ID" in env and "SLURM_ARRAY_TASK_ID" in env:
        return f"{env['SLURM_ARRAY_JOB_ID']}_{env['SLURM_ARRAY_TASK_ID']}"
    return env.get("SLURM_JOB_ID")

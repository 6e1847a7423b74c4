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
from dataclasses import asdict, dataclass, fields, replace
from functools import cache
from pathlib import Path
from typing import Any

from clipsae.errors import ConfigError
from clipsae.store.files import read_json

FREE = "free"
LEASE = "lease.json"
TOKEN = re.compile(r"(?P<machine>[0-9a-f]{8})-(?P<pid>\d+)-(?P<born>\d+)-[0-9a-f]{16}")
TAKEN = (errno.ENOENT, errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR)


class StoreError(ConfigError):
    """The store cannot do what it should, in one sentence that says how to go on."""


class LeaseLost(Exception):
    """This process stood still for so long that another took its work over."""


@dataclass(frozen=True)
class Owner:
    """Who holds a lease, as `lease.json` has it.

    Attributes:
        token: the folder's name.
        host, pid: the process.
        job: its SLURM job ("123" or "123_4"), or None.
        since: local date and time on that host; shown, never compared.
        done, total: how far it is, in steps, or None.
        job_id, restart: of SLURM: a requeued job has the same id.
        group: what the ranks of one distributed run have in common; None: unknown.
    """

    token: str
    host: str
    pid: int
    job: str | None
    since: str
    done: int | None = None
    total: int | None = None
    job_id: str | None = None
    restart: int = 0
    group: str | None = None

    def __str__(self) -> str:
        job = f", SLURM job {self.job}" if self.job else ""
        far = "" if self.done is None else f", step {self.done:,} of {self.total:,}"
        return f"{self.host} (process {self.pid}{job}) since {self.since}{far}"

    @classmethod
    def this_process(cls, token: str = "") -> "Owner":
        env = os.environ
        job_id, restart = env.get("SLURM_JOB_ID"), int(env.get("SLURM_RESTART_COUNT", 0))
        array = [env.get("SLURM_ARRAY_JOB_ID"), env.get("SLURM_ARRAY_TASK_ID")]
        group = None
        if "TORCHELASTIC_RUN_ID" in env:
            group = f"{env['TORCHELASTIC_RUN_ID']}:{env.get('MASTER_PORT')}"
        elif job_id and "SLURM_STEP_ID" in env:
            group = f"{job_id}.{env['SLURM_STEP_ID']}.{restart}"
        return cls(
            token,
            platform.node(),
            os.getpid(),
            "_".join(map(str, array)) if all(array) else job_id,
            time.strftime("%Y-%m-%d %H:%M:%S"),
            job_id=job_id,
            restart=restart,
            group=group,
        )


def owner_of(folder: Path) -> Owner | None:
    """Who holds a lease, or held it last; None where nothing was written."""
    lease = read_json(folder / LEASE)
    try:
        return Owner(**{f.name: lease[f.name] for f in fields(Owner) if f.name in lease})
    except TypeError:
        return None


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
        self._owner = Owner.this_process(folder.name)
        self._write()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._keep, args=(beat,), daemon=True)
        self._thread.start()

    def progress(self, done: int, total: int) -> None:
        """Note how far the work is; it is written with the next beat.

        Raises:
            LeaseLost: another process has taken over.
        """
        self._owner = replace(self._owner, done=done, total=total)
        if self.lost:
            raise LeaseLost(self.folder.parent.name)

    def release(self) -> None:
        """Leave the folder to the next process."""
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
        """End the heartbeat, with a last note on how far the work was."""
        self._ended.set()
        self._thread.join(timeout=5)
        self._write()

    def _keep(self, beat: float) -> None:
        while not self._ended.wait(beat):
            self._write()

    def _write(self) -> None:
        self._beats += 1
        path, aside = self.folder / LEASE, self.folder / f".{LEASE}.tmp"
        try:
            aside.write_text(json.dumps({**asdict(self._owner), "beat": self._beats}))
            aside.replace(path)
        except OSError:
            # On a full disk a new time stamp is a sign of life, too; without the folder none is.
            try:
                os.utime(path)
            except OSError:
                self.lost = not self.folder.exists()


class Watch:
    """Judges whether the owners of leases are alive by the changes it has seen.

    Args:
        dead_after: seconds without a change after which an owner counts as dead.
        clock: seconds that never go back.
    """

    def __init__(self, dead_after: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.dead_after = dead_after
        self.clock = clock
        self._seen: dict[str, tuple[Any, float, int]] = {}

    def alive(self, folder: Path) -> bool | None:
        """True: a sign of life was seen. False: dead, or free. None: not known yet."""
        if surely_dead(folder):
            return False
        try:
            path = folder / LEASE
            sign = path.stat().st_mtime_ns, path.read_bytes()
        except OSError:
            sign = None
        last, when, changes = self._seen.get(folder.name, (None, 0.0, -1))
        if changes < 0 or sign != last:
            when, changes = self.clock(), changes + 1
            self._seen[folder.name] = (sign, when, changes)
        if self.clock() - when > self.dead_after:
            return False
        return True if changes > 0 or lives_here(folder.name) else None


def surely_dead(folder: Path) -> bool:
    """Whether no waiting is needed to know that nobody holds a lease: it is free, its process was
    one of this machine and has ended, or it is an earlier run of this same SLURM job."""
    if folder.name == FREE:
        return True
    match = TOKEN.fullmatch(folder.name)
    if match and match["machine"] == machine():
        return not lives_here(folder.name)
    owner, me = owner_of(folder), Owner.this_process()
    if owner is None or owner.token != folder.name:
        return False
    return me.job_id is not None and owner.job_id == me.job_id and owner.restart < me.restart


def is_my_group(folder: Path) -> bool:
    """Whether the first rank of the distributed run that this process is in holds a lease."""
    owner = owner_of(folder)
    if owner is None or owner.token != folder.name:
        return False
    if owner.group is not None and owner.group == Owner.this_process().group:
        return True
    return folder.name.startswith(f"{machine()}-{os.getppid()}-")


def find(partial: Path) -> Path | None:
    """The lease of an unfinished stage; None where there is none."""
    return _find(partial)[0]


def _find(partial: Path) -> tuple[Path | None, list[str]]:
    """The lease, and all names in the folder."""
    try:
        names = [path.name for path in partial.iterdir()]
    except (FileNotFoundError, NotADirectoryError):
        return None, []
    found = [name for name in names if name == FREE or TOKEN.fullmatch(name)]
    return partial / found[0] if found else None, names


def begin(partial: Path, beat: float) -> Lease | None:
    """Begin an unfinished stage with a lease of this process; None where another was faster.

    Raises:
        StoreError: there are other files in its place.
    """
    token = new_token()
    aside = partial.with_name(f"{partial.name}.{token}")
    (aside / token).mkdir(parents=True)
    if _rename(aside, partial, partial / token):
        return Lease(partial / token, beat)
    shutil.rmtree(aside, ignore_errors=True)
    folder, names = _find(partial)
    if folder is None and names:
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
        state, *rest = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        if Path("/proc/self/stat").exists():
            return None
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return None
        except OSError:  # of another user
            return 0
        return 0
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

"""The store and its stages."""

import contextlib
import errno
import hashlib
import json
import logging
import platform
import random
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from clipsae.store import files, lease
from clipsae.store.files import MARK, find_damage, write_json
from clipsae.store.lease import FREE, Lease, LeaseLost, StoreError, Watch

log = logging.getLogger(__name__)

SCHEMA = 6  # raise it when the same config would no longer give the same content
ABOUT = "about.json"  # what an unfinished stage is
FAILED = "failed.json"  # why its last making failed
BEAT = 15.0  # seconds between two signs of life
DEAD_AFTER = 180.0  # seconds without one; a network file system may show files a minute late
REMIND = 300.0  # seconds between two lines about who is waited for
POLLS = (0.05, 5.0)  # seconds between two checks while waiting: at first, in the end
PACKAGES = ("clipsae", "torch", "lightning", "open_clip_torch", "torchmetrics", "hydra-core")


class Damaged(StoreError):
    """A finished folder is not as it was sealed."""


class Busy(StoreError):
    """Another process is making the stage, and the caller does not wait."""


def digest(key: Mapping[str, Any]) -> str:
    """Ten hex digits of the SHA-256 of a JSON-like mapping, in any order of its keys.

    Raises:
        TypeError: a value that JSON cannot hold.
    """
    text = json.dumps({"schema": SCHEMA, **key}, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:10]


@dataclass
class Stage:
    """A piece of work with a place in the store.

    Attributes:
        path: the folder of the finished work.
        key: what determines its content.
        about: model, dataset, k, seed, for `task=status`.
        beat, dead_after: the lease's, see `Store`.
    """

    path: Path
    key: Mapping[str, Any]
    about: Mapping[str, Any] = field(default_factory=dict)
    beat: float = BEAT
    dead_after: float = DEAD_AFTER
    _lease: Lease | None = field(default=None, init=False, repr=False)
    _joined: Path | None = field(default=None, init=False, repr=False)  # the first rank's lease
    _waited_for: tuple[str, float] = field(default=("", 0.0), init=False, repr=False)

    @property
    def partial(self) -> Path:
        """The folder that is there while the stage is unfinished."""
        return self.path.with_name(f".{self.path.name}.partial")

    @property
    def lease_folder(self) -> Path:
        """The folder in it that belongs to its owner; each owner gives it another name."""
        if self._lease is not None:
            return self._lease.folder
        return self._joined or lease.find(self.partial) or self.partial / FREE

    @property
    def staging(self) -> Path:
        """The folder while the work is being made."""
        return self.lease_folder / "staging"

    @property
    def scratch(self) -> Path:
        """A folder for checkpoints, kept until the work is finished. Its path holds while `build`
        runs."""
        return self.lease_folder / "scratch"

    @property
    def finished(self) -> bool:
        """Whether it is there, with its mark and with files of the right sizes."""
        return self.path.is_dir() and find_damage(self.path, content=False) is None

    def verify(self) -> None:
        """Compare every file with its checksum.

        Raises:
            Damaged: it is not there, or not as it was sealed.
        """
        if (wrong := find_damage(self.path)) is not None:
            raise Damaged(f"{self.path}: {wrong}: run the command that produced it again")

    def progress(self, done: int, total: int) -> None:
        """Note how far `build` is, in steps; costs nothing.

        Raises:
            LeaseLost: this process stood still and another has taken over; let it pass.
        """
        if self._lease is not None:
            self._lease.progress(done, total)

    def make(
        self,
        build: Callable[[Path], None],
        *,
        wait: bool = True,
        check: Literal["content", "size"] = "content",
        rank: int = 0,
    ) -> Path:
        """Return the finished folder, making it first where it is missing or damaged.

        Args:
            build: writes the content into the folder that it is given, which is empty. It may
                find in `scratch` what an earlier, interrupted call left.
            wait: while another process makes it, wait and use what it made (or go on from its
                checkpoint if it dies).
            check: how finished work is verified before it is used: "content" compares checksums
                (a second for a gigabyte or two), "size" is for what is too large for that.
            rank: of this process in a distributed run whose ranks all call `build`: the lease is
                rank 0's, the others join it.

        Raises:
            Busy: another process makes it, and `wait` is False.
            StoreError: the disk is full, or the store cannot be written to.
        """
        watch, (pause, longest) = Watch(self.dead_after), POLLS
        while True:
            if self.path.exists() and self._damage(check) is None:
                return self.path
            made = self._join(build, watch) if rank else self._lead(build, watch, wait, check)
            if made:
                return self.path
            time.sleep(pause * random.uniform(0.8, 1.2))  # a hundred jobs are no burden
            pause = min(1.3 * pause, longest)

    def _damage(self, check: str) -> str | None:
        return find_damage(self.path, content=check == "content")

    def _lead(self, build: Callable[[Path], None], watch: Watch, wait: bool, check: str) -> bool:
        """Make it if the lease can be had; whether it is finished now."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            folder = lease.find(self.partial)
            if folder is None:
                self._lease = lease.begin(self.partial, self.beat)
            elif not self._is_held(folder, watch, wait):
                owner = lease.owner_of(folder)
                self._lease = lease.take(folder, self.beat)
                if self._lease and folder.name != FREE:
                    log.info("%s was left by %s: taking over", self.path.name, owner)
        except OSError as error:
            raise self._readable(error) from error
        if self._lease is None:
            return False
        try:
            self._build(self._lease, build, check)
        except LeaseLost:
            log.warning(
                "%s was taken over by another process while this one was suspended: using its work",
                self.path.name,
            )
            return False
        finally:
            self._lease.release()
            self._lease = None
        return True

    def _is_held(self, folder: Path, watch: Watch, wait: bool) -> bool:
        """Whether the owner of a lease may be alive. Logs it, now and then."""
        alive = watch.alive(folder)
        if alive is False:
            return False
        owner = lease.owner_of(folder) or "another process"
        if alive and not wait:
            raise Busy(f"{self.path.name} is being made by {owner}: run again later")
        if self._waited_for[0] != folder.name or time.monotonic() - self._waited_for[1] > REMIND:
            self._waited_for = folder.name, time.monotonic()
            log.info("waiting for %s: made by %s", self.path.name, owner)
        return True

    def _build(self, held: Lease, build: Callable[[Path], None], check: str) -> None:
        """Make it, holding the lease."""
        try:
            if self.path.exists():
                wrong = self._damage(check)
                if wrong is None:  # made while the lease was being taken
                    held.discard()
                    return
                aside = files.set_aside(self.path)
                log.warning("%s: %s: set aside as %s, recomputed", self.path, wrong, aside.name)
            (held.folder / FAILED).unlink(missing_ok=True)
            shutil.rmtree(self.staging, ignore_errors=True)
            self.staging.mkdir()
            self.scratch.mkdir(exist_ok=True)
            stage = {"key": dict(self.key), "about": dict(self.about)}
            write_json(held.folder / ABOUT, stage)
            started, clock = time.time(), time.monotonic()
            build(self.staging)
            meta = {
                **stage,
                "schema": SCHEMA,
                "started": started,
                "finished": time.time(),
                "seconds": time.monotonic() - clock,
                "versions": {name: version(name) for name in PACKAGES},
                "python": platform.python_version(),
                "git_commit": git_commit(),
                "host": platform.node(),
            }
            files.seal(self.staging, meta)
            try:
                self.staging.rename(self.path)
            except OSError:
                # There already: finished by another, which a network file system showed late.
                if not self.finished:
                    raise
            files.fsync(self.path.parent)
            held.discard()
        except Exception as error:
            if held.lost or not held.folder.exists():
                raise LeaseLost(self.path.name) from error
            readable = self._readable(error)
            shutil.rmtree(self.staging, ignore_errors=True)  # of no use, and the disk may be full
            failure = {
                "time": time.strftime("%Y-%m-%d %H:%M:%S"),
                "host": platform.node(),
                "type": type(readable).__name__,
                "message": (str(readable).strip().splitlines() or [""])[-1],
            }
            with contextlib.suppress(OSError):
                write_json(held.folder / FAILED, failure)
            if readable is error:
                raise
            raise readable from error

    def _join(self, build: Callable[[Path], None], watch: Watch) -> bool:
        """As a rank that is not the first: build along in the first one's folder once it is there,
        and see it published."""
        folder = lease.find(self.partial)
        if folder is None:
            return False
        if not lease.is_my_group(folder):
            self._is_held(folder, watch, wait=True)
            return False
        if not (folder / "staging").is_dir():
            return False
        self._joined = folder
        try:
            build(self.staging)
            while folder.exists():
                time.sleep(POLLS[0])
        finally:
            self._joined = None
        if not self.finished:
            raise StoreError(f"{self.path.name}: the first rank did not finish it")
        return True

    def _readable(self, error: Exception) -> Exception:
        """The same error, or in its place the sentence for a full disk or a store that cannot be
        written to."""
        where, name = self.path.parent, self.path.name
        if isinstance(error, StoreError):
            return error
        if files.disk_is_full(error, where):
            free = files.free_bytes(where) / 1e6
            return StoreError(
                f"{where}: no space left on the disk ({free:.1f} MB free) for {name}: make space "
                "and run the same command again, it continues from its last checkpoint"
            )
        code = error.errno if isinstance(error, OSError) else None
        if code == errno.EROFS or (code in (errno.EACCES, errno.EPERM) and self._lease is None):
            return StoreError(
                f"{where}: cannot be written to, and {name} is not finished there: set "
                "paths.output_dir to a folder of your own"
            )
        return error


def git_commit() -> str | None:
    """The commit of the working tree that the package lies in; None outside of one."""
    command = ["git", "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"]
    options: Any = {"cwd": Path(__file__).parent, "capture_output": True, "timeout": 10}
    try:
        return subprocess.run(command, text=True, check=True, **options).stdout.strip() or None
    except (OSError, subprocess.SubprocessError):
        return None


class Store:
    """The folder that holds all finished work.

    Args:
        root: created when something is first written.
        beat: seconds between two signs of life of a process that makes a stage.
        dead_after: seconds without one after which others take its work over.
    """

    def __init__(
        self, root: Path | str, *, beat: float = BEAT, dead_after: float = DEAD_AFTER
    ) -> None:
        self.root = Path(root)
        self.beat = beat
        self.dead_after = dead_after

    def stage(
        self,
        kind: str,
        words: list[str],
        key: Mapping[str, Any],
        about: Mapping[str, Any] | None = None,
    ) -> Stage:
        """The place of one piece of work.

        Args:
            kind: "sae", "evaluation", ...: the folder it lies in.
            words: the readable part of the name.
            key: what determines the content: plain JSON values, no paths, no devices.
            about: model, dataset, k, seed, for `task=status`.
        """
        slug = "-".join(re.sub(r"[^\w.-]", "_", word.lower()) for word in words)
        path = self.root / kind / f"{slug}-{digest(key)}"
        return Stage(path, key, dict(about or {}), self.beat, self.dead_after)

    def finished(self, kind: str) -> list[Path]:
        """All finished folders of a kind, sorted by name."""
        return sorted(mark.parent for mark in (self.root / kind).glob(f"[!.]*/{MARK}"))

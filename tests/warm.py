"""Commands in forks of a process that has imported everything (see `tests/preload.py`): a fraction
of a second instead of the eight that torch and lightning take to import.

Tests call `run_py` and `start_py`, which are `run.py` in such a fork.
"""

import atexit
import contextlib
import multiprocessing
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).resolve().parents[1]
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["tests.preload"])
# A failed test may leave one behind, which multiprocessing would wait for.
atexit.register(lambda: [process.kill() for process in multiprocessing.active_children()])


def run_py(*overrides: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """`run.py` with overrides, in the project's folder; options are those of `fork`."""
    return fork(_run, *overrides, **options)


def fork(
    function: Callable[..., None],
    *arguments: str,
    cwd: Path = ROOT,
    env: Mapping[str, str] | None = None,
    check: bool = False,
) -> subprocess.CompletedProcess[str]:
    """Call a function in a fork, wait for it and capture its output, as `subprocess.run` would."""
    with tempfile.NamedTemporaryFile("r") as out, tempfile.NamedTemporaryFile("r") as err:
        process = Fork(function, arguments, out.name, err.name, cwd, env)
        done = subprocess.CompletedProcess(arguments, process.wait(), out.read(), err.read())
    if check:
        done.check_returncode()
    return done


def start_py(*overrides: str, output: IO[str] | None = None) -> "Fork":
    """`run.py` with overrides, in the project's folder; does not wait for it.

    Args:
        output: the file to which its output and its errors go; None: kept for `communicate`.
    """
    name = output.name if output else str(Path(tempfile.mkdtemp(), "output"))
    return Fork(_run, overrides, name, name)


class Fork(SERVER.Process):
    """A function in a fork; to the caller it is like a `subprocess.Popen`."""

    def __init__(
        self,
        function: Callable[..., None],
        arguments: tuple[str, ...],
        out: str,
        err: str,
        cwd: Path = ROOT,
        env: Mapping[str, str] | None = None,
    ) -> None:
        env = dict(os.environ if env is None else env)
        super().__init__(target=_child, args=(function, arguments, out, err, str(cwd), env))
        self.out = out
        with contextlib.chdir(ROOT):  # where the server, if it is not there yet, finds its modules
            self.start()

    def poll(self) -> int | None:
        return self.exitcode

    returncode = property(poll)

    def wait(self, timeout: float | None = None) -> int:
        self.join(timeout)
        if self.exitcode is None:
            raise subprocess.TimeoutExpired(self.name, timeout)
        return self.exitcode

    def communicate(self, timeout: float | None = None) -> tuple[str, None]:
        self.wait(timeout)
        return self.stdout.read(), None

    @property
    def stdout(self) -> IO[str]:
        return Path(self.out).open()

    def send_signal(self, sig: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, sig)


def _child(function, arguments, out, err, cwd, env) -> None:
    for target, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), target)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    try:
        function(*arguments)
    finally:
        atexit._run_exitfuncs()


def _run(*overrides: str) -> None:
    from run import main

    sys.argv = ["run.py", *overrides]
    main()

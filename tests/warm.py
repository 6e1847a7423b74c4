"""A process that has imported everything, and forks for each command.

Starting Python with torch and lightning takes seconds of a core; a fork of this process takes none.
Tests call `run_py` and `start_py`, which are `run.py` in such a fork.
"""

import array
import atexit
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import traceback
import weakref
from collections.abc import Callable
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).resolve().parents[1]
IMPORTED = (
    "lightning.pytorch",
    "matplotlib.pyplot",
    "open_clip",
    "torchmetrics",
    "clipsae.cli",
    "clipsae.tasks.experiment",
    "clipsae.tasks.explore",
    "clipsae.tasks.report",
    "clipsae.tasks.visualize",
)
SHIM = """#!{python} -IS
import array, json, os, socket, sys
with socket.socket(socket.AF_UNIX) as s:
    s.connect({address!r})
    s.sendmsg([b"."], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [0, 1, 2]))])
    what = [os.path.basename(sys.argv[0]), *sys.argv[1:]]
    s.sendall(json.dumps([what, os.getcwd(), dict(os.environ)]).encode() + b"\\n")
    answers = s.makefile()
    pid = answers.readline()
    if "WARM_PID" in os.environ:
        os.write(int(os.environ["WARM_PID"]), pid.encode())
    sys.exit(int(answers.readline() or 1))
"""


def run_py(*overrides: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """`run.py` with overrides, in the project's folder; options are those of `subprocess.run`."""
    options = {"cwd": ROOT, "stdin": subprocess.DEVNULL, "capture_output": True} | options
    return subprocess.run([_own() / "run.py", *overrides], text=True, **options)


class Started(subprocess.Popen[str]):
    """A process that stands for the fork which does the work; signals go to that."""

    worker: int

    def send_signal(self, sig: int) -> None:
        if self.poll() is None:
            os.kill(self.worker, sig)


def start_py(*overrides: str, output: IO[str] | int = subprocess.PIPE) -> Started:
    """`run.py` with overrides, in the project's folder, which goes on by itself. Its output and its
    errors are one. It ends with status 1 if it is killed."""
    reader, writer = os.pipe()
    process = Started(
        [_own() / "run.py", *overrides],
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
        text=True,
        pass_fds=[writer],
        env={**os.environ, "WARM_PID": str(writer)},
    )
    os.close(writer)
    process.worker = int(os.read(reader, 100))
    os.close(reader)
    return process


@cache
def _own() -> Path:
    """The folder of `run.py` of this process's own server, which ends with this process."""
    folder = Path(tempfile.mkdtemp(prefix="warm-"))
    start(folder, Path(__file__), "run.py")
    return folder


def start(folder: Path, script: Path, *names: str) -> subprocess.Popen[str]:
    """Start a server that runs commands.

    Args:
        folder: gets executables of the given names; each is a command of the server.
        script: calls `serve` with its first argument.
    """
    address = folder / "socket"
    for name in names:
        (folder / name).write_text(SHIM.format(python=sys.executable, address=str(address)))
        (folder / name).chmod(0o755)
    process = subprocess.Popen(
        [sys.executable, script, address],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"},
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def serve(address: str, command: Callable[..., None]) -> None:
    """Fork for each call, until standard input ends.

    Args:
        address: the socket to make.
        command: called in the fork with the executable's name and its arguments.
    """
    for name in IMPORTED:
        import_module(name)
    # The end of one fork must not remove for the next ones what importing has made.
    atexit.unregister(import_module("wandb.sdk.data_types._private").MEDIA_TMP.cleanup)
    for finalizer in list(weakref.finalize._registry):
        finalizer.atexit = False
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(address)
        server.listen()
        print("ready", flush=True)
        while server in select.select([server, sys.stdin], [], [])[0]:
            connection, _ = server.accept()
            if os.fork() == 0:
                server.close()
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                _answer(connection, command)
            connection.close()


def _answer(connection: socket.socket, command: Callable[..., None]) -> None:
    fds = array.array("i")
    _, rights, _, _ = connection.recvmsg(1, socket.CMSG_SPACE(3 * fds.itemsize))
    fds.frombytes(rights[0][2][: 3 * fds.itemsize])
    arguments, cwd, environment = json.loads(connection.makefile().readline())
    connection.sendall(f"{os.getpid()}\n".encode())
    for target, fd in enumerate(fds):
        os.dup2(fd, target)
        os.close(fd)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    os.environ.pop("WANDB_SERVICE", None)  # W&B's own process, which a test may have started
    paths = environment.get("PYTHONPATH", "").split(os.pathsep)
    sys.path[:0] = [os.path.abspath(path) for path in paths if path]  # noqa: PTH100
    code: object = 0
    try:
        command(*arguments)
    except SystemExit as stop:
        code = stop.code
    except BaseException:
        traceback.print_exc()
        code = 1
    if isinstance(code, str):
        print(code, file=sys.stderr)
        code = 1
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    connection.sendall(f"{code or 0}\n".encode())
    os._exit(0)


def _run(program: str, *overrides: str) -> None:
    sys.argv = [program, *overrides]
    from run import main

    main()


if __name__ == "__main__":
    serve(sys.argv[1], _run)

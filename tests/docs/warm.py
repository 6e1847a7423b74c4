"""A process that has imported everything, and forks for each command of the documentation.

Starting Python with torch and lightning takes seconds; a fork of this process takes none. `main`
serves a socket; `SHIM` is what `python` and `clipsae` are in the documentation's shell.
"""

import array
import atexit
import json
import os
import re
import runpy
import shlex
import signal
import socket
import sys
import tomllib
import traceback
from importlib import import_module
from pathlib import Path

IMPORTED = (
    "lightning.pytorch",
    "matplotlib.pyplot",
    "torchmetrics",
    "clipsae.cli",
    "clipsae.tasks.experiment",
    "clipsae.tasks.report",
)
ROOT = Path(__file__).resolve().parents[2]

SHIM = """#!{python} -IS
import array, json, os, socket, sys
with socket.socket(socket.AF_UNIX) as s:
    s.connect({address!r})
    s.sendmsg([b"."], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [0, 1, 2]))])
    what = [os.path.basename(sys.argv[0]), *sys.argv[1:]]
    s.sendall(json.dumps([what, os.getcwd(), dict(os.environ)]).encode() + b"\\n")
    sys.exit(int(s.makefile().readline() or 1))
"""


def write_shims(folder: Path, address: Path) -> None:
    """The commands `python` and `clipsae`, in a folder for PATH."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("python", "clipsae"):
        (folder / name).write_text(SHIM.format(python=sys.executable, address=str(address)))
        (folder / name).chmod(0o755)


def main(address: str) -> None:
    """Serve until the parent goes."""
    for name in IMPORTED:
        import_module(name)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(address)
        server.listen()
        print("ready", flush=True)
        while True:
            connection, _ = server.accept()
            if os.fork() == 0:
                server.close()
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                _serve(connection)
            connection.close()


def _serve(connection: socket.socket) -> None:
    fds = array.array("i")
    _, rights, _, _ = connection.recvmsg(1, socket.CMSG_SPACE(3 * fds.itemsize))
    fds.frombytes(rights[0][2][: 3 * fds.itemsize])
    arguments, cwd, environment = json.loads(connection.makefile().readline())
    for target, fd in enumerate(fds):
        os.dup2(fd, target)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    paths = environment.get("PYTHONPATH", "").split(os.pathsep)
    sys.path[:0] = [os.path.abspath(path) for path in paths if path]  # noqa: PTH100
    code: object = 0
    try:
        _command(*arguments)
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


def _command(program: str, *arguments: str) -> None:
    if program == "clipsae" or arguments[:1] == ("run.py",):
        _run(arguments if program == "clipsae" else arguments[1:])
    elif arguments[:3] == ("-m", "pip", "install"):
        _installed(arguments[3:])
    elif arguments[:2] == ("-m", "pytest"):
        print("not within itself:", shlex.join(arguments))
    elif arguments[:2] == ("-m", "http.server"):
        print("would serve:", shlex.join(arguments))
    elif arguments[0].startswith("tests/benchmarks/"):
        _script(arguments[0], ["--help"])  # minutes, and a quiet machine
    elif arguments[0].endswith(".py"):
        _script(arguments[0], arguments[1:])
    else:
        sys.exit(f"python {shlex.join(arguments)}: the documentation's tests do not know this")


def _script(path: str, arguments: tuple[str, ...] | list[str]) -> None:
    sys.argv = [path, *arguments]
    sys.path.insert(0, str(Path(path).resolve().parent))
    runpy.run_path(path, run_name="__main__")


def _run(arguments: tuple[str, ...]) -> None:
    """Compose as written; then run small, unless it needs what is not here."""
    from clipsae.cli import main as run
    from tests.docs import small

    command = small.parse(arguments)
    cfg = small.compose(command, ROOT / "conf")
    needs = os.environ.get("DOCS_NEEDS")
    if needs not in (None, "the weights"):
        print(f"composed; needs {needs}")
        return
    if {"--help", "--cfg"} & set(command.flags):
        sys.argv = ["run.py", *arguments]
    else:
        sys.argv = ["run.py", *small.shrunken(command, cfg, "tiny" if needs else None)]
    print("$", shlex.join(sys.argv))
    sys.stdout.flush()
    run()


def _installed(requirements: tuple[str, ...]) -> None:
    """The environment of the tests is what such a command makes; its extras must exist."""
    known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for requirement in requirements:
        extras = re.search(r"\[(.*)\]", requirement)
        unknown = set(extras[1].split(",") if extras else []) - set(known)
        if unknown:
            sys.exit(f"pyproject.toml has no extra {', '.join(unknown)}")


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main(sys.argv[1])

"""What `python` and `clipsae` are in the documentation's shell: forks of a warm process."""

import os
import re
import runpy
import shlex
import sys
import tomllib
from pathlib import Path

from tests.warm import ROOT, serve


def _command(program: str, *arguments: str) -> None:
    if program == "clipsae" or arguments[:1] == ("run.py",):
        _run(arguments if program == "clipsae" else arguments[1:])
    elif arguments[:3] == ("-m", "pip", "install"):
        _installed(arguments[3:])
    elif arguments[:2] == ("-m", "clipsae.pretraining"):
        from clipsae.pretraining.__main__ import parse

        print("would train:", parse(arguments[2:]))  # half an hour
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
    serve(sys.argv[1], _command)

"""What made a result: versions, commit, host."""

import platform
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

PACKAGES = ("clipsae", "torch", "lightning", "open_clip_torch", "torchmetrics", "hydra-core")


def provenance() -> dict[str, Any]:
    """Where a result comes from: versions, git commit (with `-dirty`), host, Python."""
    return {
        "versions": {name: version(name) for name in PACKAGES},
        "python": platform.python_version(),
        "git_commit": git_commit(),
        "host": platform.node(),
    }


def git_commit() -> str | None:
    """The commit of the working tree that the package lies in; None outside of one."""
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None

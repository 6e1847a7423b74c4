"""Which machine and which process: what a lease's token says."""

import contextlib
import hashlib
import os
import platform
import re
import secrets
from functools import cache
from pathlib import Path

TOKEN = re.compile(r"(?P<machine>[0-9a-f]{8})-(?P<pid>\d+)-(?P<born>\d+)-[0-9a-f]{16}")


@cache
def machine() -> str:
    """Eight hex digits for what shares our process ids: host, its boot, the pid namespace."""
    facts = [platform.node()]
    for read in (
        lambda: Path("/proc/sys/kernel/random/boot_id").read_text(),
        lambda: Path("/proc/self/ns/pid").readlink().name,
    ):
        with contextlib.suppress(OSError):
            facts.append(read())
    return hashlib.sha256("\n".join(facts).encode()).hexdigest()[:8]


def born(pid: int) -> int | None:
    """When a process of this machine started, in ticks since boot; None: it has ended. (0 where
    the system does not tell.)"""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        if Path("/proc/self/stat").exists():
            return None
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return None
        except OSError:
            pass
        return 0
    state, *rest = text.rpartition(")")[2].split()
    return None if state in "ZX" else int(rest[18])


def new_token() -> str:
    """A name for one making of one stage by this process; never used twice."""
    return f"{machine()}-{os.getpid()}-{born(os.getpid())}-{secrets.token_hex(8)}"


def process_group() -> str | None:
    """What the ranks of one distributed run have in common; None where nothing tells."""
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


def lives_here(token: str) -> bool:
    """Whether a token's process is one of this machine that has not ended."""
    match = TOKEN.fullmatch(token)
    if match is None or match["machine"] != machine():
        return False
    return born(int(match["pid"])) == int(match["born"])

"""What a job of a sweep does on SLURM besides its work: it never holds a GPU while it waits, and
says goodbye to W&B before it is queued again."""

import logging
import os
import signal
import subprocess
import sys

log = logging.getLogger(__name__)


def can_give_way() -> bool:
    """Whether this process is a job of a sweep that SLURM can queue again as it is."""
    return os.environ.get("SUBMITIT_EXECUTOR") == "slurm" and "SLURM_JOB_ID" in os.environ


def give_way(to: str, what: str) -> None:
    """Queue this job again, to be started when job `to` ends; returns where that cannot be.

    SLURM stops this process some moments after `scontrol requeue`; in them the dependency is set,
    which a running job cannot have. It is then started once, after however many hours, and
    another job of the sweep has the place meanwhile.

    Args:
        to: a SLURM job, "123" or "123_4".
        what: is being made there, for the log.

    Raises:
        SystemExit: it is queued again.
    """
    env = os.environ
    me = env["SLURM_JOB_ID"]
    if "SLURM_ARRAY_JOB_ID" in env:  # by its own number SLURM looks for it twice, and complains
        me = f"{env['SLURM_ARRAY_JOB_ID']}_{env['SLURM_ARRAY_TASK_ID']}"
    # SIGTERM comes at once, and is for the children, too; at SIGUSR2 submitit would requeue again.
    before = {n: signal.signal(n, signal.SIG_IGN) for n in (signal.SIGTERM, signal.SIGUSR2)}
    if not _scontrol("requeue", me):
        for number, handler in before.items():
            signal.signal(number, handler)
        return
    log.info("%s is being made by SLURM job %s: this job queues behind it", what, to)
    _scontrol("update", f"JobId={me}", f"Dependency=afterany:{to}")
    sys.exit(1)  # its status counts for nothing any more


def _scontrol(*arguments: str) -> bool:
    try:
        done = subprocess.run(
            ["scontrol", *arguments], capture_output=True, text=True, timeout=60, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        log.warning("scontrol %s: %s", " ".join(arguments), error)
        return False
    if done.returncode:
        log.warning("scontrol %s: %s", " ".join(arguments), done.stderr.strip())
    return done.returncode == 0

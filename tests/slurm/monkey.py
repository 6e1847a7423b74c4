"""Disturbs the jobs of a sweep, and reads its results."""

import contextlib
import os
import random
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pandas as pd

ACTS = {
    "requeue": ["scontrol", "requeue"],
    "cancel": ["scancel"],
    "kill": ["scancel", "--signal=KILL"],
    "term": ["scancel", "--signal=TERM"],
    "usr2": ["scancel", "--signal=USR2"],
}


class Monkey(threading.Thread):
    """Disturbs a random job again and again, until it is stopped or has acted often enough.

    Args:
        name: the jobs'.
        seed: of the acts, their jobs and times.
        acts: how many in total.
        every: mean seconds between two.
        parent: the command that waits for the jobs, which is killed now and then.
    """

    def __init__(
        self,
        name: str,
        seed: int,
        acts: int,
        every: float,
        parent: Callable[[], subprocess.Popen],
    ) -> None:
        super().__init__(daemon=True)
        self.name_of_jobs = name
        self.random = random.Random(seed)
        self.acts = acts
        self.every = every
        self.parent = parent
        self.done: list[str] = []
        self.stopped = threading.Event()

    def run(self) -> None:
        while len(self.done) < self.acts and not self.stopped.is_set():
            self.stopped.wait(self.random.expovariate(1 / self.every))
            act = self.random.choice([*ACTS, "python", "parent"])
            jobs = self.jobs()
            if not jobs:
                continue
            job = self.random.choice(jobs)
            if act == "parent":
                self.parent().kill()
            elif act == "python":
                for pid in processes(job):
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
            else:
                # Not waited for: while a job changes hands scancel tries again for a minute.
                subprocess.Popen(["timeout", "5", *ACTS[act], job], stderr=subprocess.DEVNULL)
            self.done.append(f"{time.strftime('%H:%M:%S')} {act} {job}")

    def jobs(self) -> list[str]:
        """The running jobs, as "123_4"."""
        listed = subprocess.run(
            ["squeue", "-h", "-n", self.name_of_jobs, "-t", "R", "-o", "%i"],
            capture_output=True,
            text=True,
        )
        return sorted(listed.stdout.split())


def processes(job: str) -> list[int]:
    """The Python processes of a job of this machine."""
    array, _, task = job.partition("_")
    mine = {f"SLURM_ARRAY_JOB_ID={array}".encode(), f"SLURM_ARRAY_TASK_ID={task}".encode()}
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if b"submitit.core._submit" in (folder / "cmdline").read_bytes() and mine <= set(
                (folder / "environ").read_bytes().split(b"\0")
            ):
                found.append(int(folder.name))
    return found


def numbers(store: Path) -> dict[str, object]:
    """The results of a sweep: weights as bytes, tables."""
    found: dict[str, object] = {}
    for file in store.glob("sae/[!.]*/sae.safetensors"):
        found[f"sae/{file.parent.name}"] = file.read_bytes()
    for name in ("results.csv", "metrics.csv"):
        for file in store.glob(f"evaluation/[!.]*/{name}"):
            found[f"{file.parent.name}/{name}"] = pd.read_csv(file).to_csv()
    return found

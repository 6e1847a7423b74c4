"""A real SLURM, where one answers."""

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.warm import start_py

SMALL = [
    "model=batch_topk",  # a threshold, counters of dead latents, projected gradients: much to keep
    "model.latents=256",
    "trainer.max_steps=300",
    "trainer.accelerator=cpu",
    "trainer.val_check_interval=100",
    "trainer.limit_val_batches=1",
    "callbacks.checkpoint_every_n_steps=20",
    "features.batch_size=4",
    "dataset.size=40",
    "evaluation.settings=[no_sae,on]",
    "measurement=none",
    "logger=none",
]


@pytest.fixture(scope="module")
def cluster() -> None:
    if shutil.which("sinfo") is None:
        pytest.skip("no SLURM here")
    try:
        subprocess.run(["sinfo"], check=True, capture_output=True, timeout=20)
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired):
        pytest.skip("no SLURM cluster answers")


@pytest.fixture(scope="module")
def jobs_name(request: pytest.FixtureRequest) -> str:
    """Of all SLURM jobs of a file of tests."""
    return f"clipsae-{request.node.path.stem}-{os.getpid()}"


@pytest.fixture(scope="module")
def launch(cluster: None, jobs_name: str) -> Iterator[Callable[..., subprocess.Popen]]:
    """Start `run.py` with small settings and more overrides; its output goes to `log`.
    What still runs in the end, here and on the cluster, is killed."""
    started = []

    def start(log: Path, *overrides: str, settings: list[str] = SMALL) -> subprocess.Popen:
        launcher = []
        if any(o.startswith("hydra/launcher=slurm") for o in overrides):
            launcher = [f"hydra.launcher.name={jobs_name}"]
        log.parent.mkdir(parents=True, exist_ok=True)
        process = start_py(*settings, *overrides, *launcher, output=log.open("a"))
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()
    subprocess.run(["scancel", f"--name={jobs_name}"], check=False)

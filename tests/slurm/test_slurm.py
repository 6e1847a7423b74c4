"""Jobs that are requeued, signalled or killed end with the same weights and results."""

import contextlib
import re
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

pytestmark = pytest.mark.slow

SLURM = "hydra/launcher=slurm"
# What happens to a job in the middle of its training; each has its own store.
DISTURBANCES = {
    "requeue": ["scontrol", "requeue"],
    "usr2": ["scancel", "--signal=USR2"],
    "term": ["scancel", "--signal=TERM"],
    "kill": ["scancel", "--signal=KILL"],
}
TIMEOUT = 200  # seconds


@dataclass
class Sweeps:
    """The outcome of all sweeps.

    Attributes:
        root: one folder per sweep, its output in `<name>.log`.
        first, second: exit statuses of the disturbed sweep, and of the same command once more.
        ranks: exit status of the other.
    """

    root: Path
    first: int
    second: int
    ranks: int

    def text(self, name: str) -> str:
        return (self.root / f"{name}.log").read_text()

    def jobs(self, name: str) -> dict[int, str]:
        """What each job of a sweep printed when it was first launched, by its number."""
        logs = (self.root / "sweeps" / name / ".submitit").glob("*/*_0_log.out")
        found = {tuple(map(int, log.parent.name.split("_"))): log.read_text() for log in logs}
        first = min(found)[0]
        return {number: text for (array, number), text in found.items() if array == first}


@pytest.fixture(scope="module")
def sweeps(launch: Callable, tmp_path_factory: pytest.TempPathFactory) -> Sweeps:
    """All sweeps at once; the cluster has four places."""
    root = tmp_path_factory.mktemp("slurm")
    stores = {name: root / name for name in DISTURBANCES}
    disturbed = [
        "hydra.mode=MULTIRUN",
        SLURM,
        f"hydra.sweep.dir={root}/sweeps/disturbed",
        "hydra.sweep.subdir=${hydra.job.num}",
        f"paths.output_dir={','.join(map(str, stores.values()))}",
    ]
    first = launch(root / "first.log", *disturbed)
    array = submitted(first, root / "first.log")
    ranks = launch(
        root / "ranks.log",
        "hydra.mode=MULTIRUN",
        SLURM,
        "trainer=ddp",
        "trainer.accelerator=cpu",
        "model=topk",
        "model.auxk=0",
        "features.batch_size=2",
        "trainer.max_steps=20",
        f"paths.output_dir={root}/ranks",
        f"hydra.sweep.dir={root}/sweeps/ranks",
    )
    left = dict(enumerate(DISTURBANCES))
    end = time.monotonic() + TIMEOUT
    while left and time.monotonic() < end:
        for number, name in list(left.items()):
            if is_training(stores[name]):
                # Not waited for: while a job changes hands scancel tries again for a minute.
                subprocess.Popen(["timeout", "3", *DISTURBANCES[name], f"{array}_{number}"])
                del left[number]
        time.sleep(0.1)
    whole = launch(root / "whole.log", f"paths.output_dir={root}/whole")
    one = launch(
        root / "one.log",
        "model=topk",
        "model.auxk=0",
        "trainer.max_steps=20",
        f"paths.output_dir={root}/one",
    )
    assert whole.wait(TIMEOUT) == one.wait(TIMEOUT) == 0, (root / "whole.log").read_text()
    status = first.wait(TIMEOUT)
    second = launch(root / "second.log", *disturbed)
    return Sweeps(root, status, second.wait(TIMEOUT), ranks.wait(TIMEOUT))


def submitted(parent: subprocess.Popen, log: Path) -> str:
    """The number of the job array."""
    while parent.poll() is None:
        if match := re.search(r"submitted \d+ jobs, (\d+)_0", log.read_text()):
            return match[1]
        time.sleep(0.1)
    pytest.fail(log.read_text())


def is_training(store: Path) -> bool:
    """Whether a first checkpoint is there."""
    with contextlib.suppress(FileNotFoundError):  # its folder has just changed hands
        return any(store.glob("sae/.*/*/scratch/last.ckpt"))
    return False


def content(store: Path) -> tuple[bytes, str]:
    """The weights and the results of the one job of a store."""
    (weights,) = store.glob("sae/[!.]*/sae.safetensors")
    (results,) = store.glob("evaluation/[!.]*/results.csv")
    return weights.read_bytes(), results.read_text()


@pytest.mark.parametrize("name", DISTURBANCES)
def test_the_disturbed_job_ends_as_the_undisturbed(sweeps, name):
    assert content(sweeps.root / name) == content(sweeps.root / "whole")


def test_who_is_told_to_leave_continues_from_that_very_step(sweeps):
    said = sweeps.jobs("disturbed")
    assert "continuing the training" in said[0]
    # Regular checkpoints are those of every 20th step.
    assert int(re.search(r"continuing .* from step (\d+)", said[1])[1]) % 20 != 0
    assert "continuing" not in said[2]  # SIGTERM alone is a warning


def test_the_killed_job_alone_fails_and_is_made_by_the_same_command(sweeps):
    assert sweeps.first == 1
    said = sweeps.text("first")
    assert "1 of 4 jobs failed" in said
    assert said.count("ended without a result") == 2  # when it was seen, and in the table
    assert f"paths.output_dir={sweeps.root}/kill" in said.replace("\n", "")
    assert sweeps.second == 0, sweeps.text("second")


def test_two_tasks_train_what_one_process_does(sweeps):
    assert sweeps.ranks == 0, sweeps.text("ranks")
    found, expected = (
        load_file(next((sweeps.root / name).glob("sae/[!.]*/sae.safetensors")))
        for name in ("ranks", "one")
    )
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-6, msg=name)

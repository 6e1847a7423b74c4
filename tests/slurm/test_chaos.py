"""Whole sweeps, disturbed at random, several at once, preempted, end with the same numbers."""

import json
import re
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from monkey import Monkey, numbers
from test_slurm import content

pytestmark = pytest.mark.slow

DEMO = [
    "sweeps=demo",
    "model.latents=256",
    "trainer.max_steps=150",  # long enough for another job to find it at work
    "trainer.accelerator=cpu",
    "trainer.val_check_interval=75",
    "trainer.limit_val_batches=1",
    "callbacks.checkpoint_every_n_steps=10",
    "features.batch_size=4",
    "dataset.size=40",
    "logger=none",
]
SLURM = "hydra/launcher=slurm"
CELLS = "model=topk,sparsemax", "dataset=scenes_shape,scenes_colour"
TIMEOUT = 600  # seconds, on a busy machine
ACTS = 5


@pytest.fixture(scope="module")
def undisturbed(launch: Callable, tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    """The results of the sweep, computed one after the other in one process."""
    root = tmp_path_factory.mktemp("undisturbed")
    log = root / "run.log"
    assert launch(log, *CELLS, f"paths.output_dir={root}", settings=DEMO).wait(TIMEOUT) == 0
    found = numbers(root)
    assert len(found) == 2 + 2 * 4
    return found


def printed(root: Path) -> list[str]:
    """What the jobs of all sweeps of a folder printed."""
    return [log.read_text() for log in root.glob("sweeps/*/.submitit/*/*_0_log.out")]


@pytest.mark.parametrize("seed", [1])
def test_a_sweep_survives_anything(undisturbed, launch, jobs_name, tmp_path, seed):
    started: list[subprocess.Popen] = []

    def again() -> int:
        log = tmp_path / f"{len(started)}.log"
        overrides = (*CELLS, SLURM, f"paths.output_dir={tmp_path}")
        started.append(launch(log, *overrides, settings=DEMO))
        return started[-1].wait(TIMEOUT)

    monkey = Monkey(jobs_name, seed, ACTS, every=2.5, parent=lambda: started[-1])
    monkey.start()
    statuses = [again()]
    while statuses[-1] != 0 and len(statuses) < 2 * ACTS:
        statuses.append(again())
    monkey.stopped.set()
    assert statuses[-1] == 0, (tmp_path / f"{len(started) - 1}.log").read_text()
    assert set(statuses) <= {0, 1, -9}, monkey.done
    assert monkey.done
    assert numbers(tmp_path) == undisturbed, monkey.done
    assert not list(tmp_path.glob("*/.*.partial")), "unfinished stages are left"


def test_sweeps_that_share_a_store_train_each_sae_once(undisturbed, launch, tmp_path):
    cells = {"one": "dataset=scenes_shape", "both": CELLS[1]}
    sweeps = {
        name: launch(
            tmp_path / f"{name}.log",
            "model=topk",
            axis,
            SLURM,
            f"paths.output_dir={tmp_path}",
            f"sweep_name={name}",
            settings=DEMO,
        )
        for name, axis in cells.items()
    }
    for name, sweep in sweeps.items():
        assert sweep.wait(TIMEOUT) == 0, (tmp_path / f"{name}.log").read_text()
    found = numbers(tmp_path)
    assert len(found) == 1 + 2 * 2
    assert found == {name: undisturbed[name] for name in found}
    said = "\n".join(printed(tmp_path))
    assert sorted(re.findall(r"\] training (\w+)-clipsae", said)) == ["topk"]
    assert "continuing" not in said
    assert "waiting for topk-clipsae" in said  # the other's training job did


def test_preempted_again_and_again(launch, jobs_name, tmp_path):
    disturbed = launch(
        tmp_path / "disturbed.log",
        "hydra.mode=MULTIRUN",
        "hydra/launcher=slurm_preempt",
        "hydra.launcher.partition=debug",
        "trainer.max_steps=300",
        "features.num_workers=1",  # is told to leave, too
        "logger=wandb",
        "logger.mode=offline",
        f"paths.output_dir={tmp_path}/disturbed",
    )
    store = tmp_path / "disturbed"
    seen = 0
    for _ in range(2):
        end = time.monotonic() + TIMEOUT
        while (step := newest_step(store)) <= seen:
            assert disturbed.poll() is None, (tmp_path / "disturbed.log").read_text()
            assert time.monotonic() < end
            time.sleep(0.05)
        seen = step
        # All places of the node, for a moment.
        demand = ["srun", "--partition=high", "--exclusive", f"--job-name={jobs_name}"]
        subprocess.run([*demand, "sleep", "1"], check=True, timeout=TIMEOUT)
        seen = max(seen, newest_step(store))
    assert disturbed.wait(TIMEOUT) == 0, (tmp_path / "disturbed.log").read_text()
    whole = launch(
        tmp_path / "whole.log", "trainer.max_steps=300", f"paths.output_dir={tmp_path}/whole"
    )
    assert whole.wait(TIMEOUT) == 0
    assert content(store) == content(tmp_path / "whole")

    (said,) = printed(store)
    assert len(re.findall("^submitit WARNING .* this job is preempted", said, re.MULTILINE)) == 2
    found = [wandb_records(log) for log in sorted(store.glob("wandb/offline-run-*/*.wandb"))]
    started = [next(record["run"] for record in run if "run" in record) for run in found]
    assert [of["job_type"] for of in started] == ["train", "train", "train", "evaluate"]
    assert len({of["run_id"] for of in started[:3]}) == 1
    runs = found[:3]
    preempted = [any(record["type"] == "preempting" for record in run) for run in runs]
    assert preempted == [True, True, False]
    exits = [r["exit"].get("exit_code", 0) for run in runs for r in run if r["type"] == "exit"]
    assert exits == [1, 1, 0]


def newest_step(store: Path) -> int:
    """Step of the newest checkpoint; 0 if there is none, or its folder has just changed owner."""
    for note in store.glob("sae/.*/*/scratch/last.ckpt.json"):
        try:
            return json.loads(note.read_text())["saved"][0]["step"]
        except (OSError, ValueError):
            pass
    return 0


def wandb_records(log: Path) -> list[dict]:
    """The records of an offline run."""
    read = subprocess.run(["wandb", "leet", "inspect", log, "--json"], capture_output=True)
    return [json.loads(line) for line in read.stdout.splitlines()]

"""What W&B is told of a job, read back from the offline runs; and that one line sends them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from clipsae.training import logging as run_logging
from clipsae.training.logging import finish, log_page, wandb_logger
from run import ROOT
from tests.warm import run_py

SERVER = ROOT / "tests" / "training" / "wandb_server.py"
JOB = [
    *("model=relu", "model.latents=64", "optimizer.warmup_steps=1", "trainer.accelerator=cpu"),
    "optimizer.sparsity_warmup_steps=1",
    *("trainer.log_every_n_steps=5", "trainer.max_steps=10", "trainer.val_check_interval=10"),
    *("trainer.limit_val_batches=1", "features.batch_size=4", "dataset=scenes_shape"),
    *("dataset.size=40", "evaluation.settings=[no_sae,on]", "measurement=none"),
    *("logger.mode=offline", "logger.tags=[mine]", "sweep_name=night"),
]


def records(folder: Path, run_id: str) -> list[dict]:
    """All that an offline run holds, in order."""
    (file,) = folder.glob(f"wandb/offline-run-*/run-{run_id}.wandb")
    told = subprocess.run(
        ["wandb", "leet", "inspect", file, "--json"], capture_output=True, text=True, check=True
    )
    return [json.loads(line) for line in told.stdout.splitlines()]


def of_type(found: list[dict], name: str) -> list[dict]:
    return [record[name] for record in found if record["type"] == name]


@pytest.fixture(scope="module")
def jobs(tmp_path_factory) -> dict[str, tuple[Path, list[dict]]]:
    """A job that ends well and uploads its SAE: its training's run and that of its results; and one
    whose loss becomes infinite: the folder, and the records of each run."""
    ended = {}
    env = {**os.environ, "WANDB_API_KEY": "5ec7e7" * 7}
    for name, more in {
        "well": ["logger.upload_sae=true"],
        "badly": ["optimizer.learning_rate=1e17"],
    }.items():
        folder = tmp_path_factory.mktemp(name)
        done = run_py(f"paths.output_dir={folder}", *JOB, *more, env=env)
        assert done.returncode == (name == "badly"), done.stdout + done.stderr
        for file in folder.glob("wandb/offline-run-*/*.wandb"):
            found = records(folder, file.stem.removeprefix("run-"))
            (run,) = of_type(found, "run")
            ended[f"{name}: {run['job_type']}"] = folder, found
    return ended


@pytest.mark.slow
@pytest.mark.parametrize("name", ["well: train", "well: evaluate", "badly: train"])
def test_a_training_is_a_run_and_so_are_its_results(jobs, name):
    assert len(jobs) == 3
    folder, found = jobs[name]
    (run,) = of_type(found, "run")
    assert run["project"] == "clipsae"
    assert run["run_group"] == "night"
    dataset = "scenes" if name.endswith("train") else "scenes_shape"
    assert run["display_name"] == f"relu-{dataset}-s0"
    assert set(run["tags"]) == {"mine", "relu", dataset, "clipsae-tiny"}
    assert run["config"]["update"]["model"]["latents"] == 64
    config = json.dumps(run["config"])
    for secret in (str(folder), str(ROOT), "5ec7e7"):
        assert secret not in config
    (ending,) = of_type(found, "exit")
    assert ending.get("exit_code", 0) == name.startswith("badly")
    if name.startswith("well"):  # the same for the same work
        (made,) = folder.glob("sae/*" if dataset == "scenes" else "evaluation/*")
        assert run["run_id"] == made.name[-10:]
        curves = "val/accuracy" in json.dumps(of_type(found, "history"))
        assert curves == (dataset == "scenes")
    else:
        assert "NaN or infinite" in json.dumps(of_type(found, "summary"))


@pytest.mark.slow
def test_the_sae_is_an_artifact_on_request(jobs):
    folder, found = jobs["well: evaluate"]
    (artifact,) = [one for one in of_type(found, "artifact") if one["type"] == "sae"]
    (sae,) = folder.glob("sae/*")
    assert artifact["name"] == sae.name
    assert set(artifact["aliases"]) == {"latest", "relu", "seed-0"}
    files = {one["path"]: one for one in artifact["manifest"]["contents"]}
    assert set(files) == {"sae.safetensors", "sae.json"}
    for name, one in files.items():
        assert int(one["size"]) == (sae / name).stat().st_size
        assert Path(one["local_path"]).read_bytes() == (sae / name).read_bytes()
    assert json.loads(artifact["metadata"]) == json.loads((sae / "sae.json").read_text())["config"]
    assert not [one for one in of_type(jobs["badly: train"][1], "artifact") if one["type"] == "sae"]


@pytest.mark.slow
def test_a_page_is_an_artifact_that_stays_as_it_was(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path))
    page = tmp_path / "topk-on-photos"
    (page / "data" / "latents").mkdir(parents=True)
    content = {"index.html": b"<!doctype html>", "data/latents/0.js": b"0", "thumb.jpg": b""}
    for name, text in content.items():
        (page / name).write_bytes(text)
    logger = wandb_logger(
        **{"project": "clipsae", "entity": None, "mode": "offline", "group": "night"},
        **{"tags": [], "name": "it", "run_id": "page1", "job_type": "explore"},
        **{"run_config": {}, "folder": tmp_path, "run_folder": tmp_path},
    )
    log_page(logger, page, ["topk"])
    finish(logger, failed=False)
    (page / "index.html").write_bytes(b"written anew")
    (artifact,) = [a for a in of_type(records(tmp_path, "page1"), "artifact") if a["type"] != "job"]
    assert (artifact["name"], artifact["type"]) == ("topk-on-photos", "explore")
    assert set(artifact["aliases"]) == {"latest", "topk"}
    sent = {f["path"]: Path(f["local_path"]) for f in artifact["manifest"]["contents"]}
    assert {name: file.read_bytes() for name, file in sent.items()} == content
    log_page(None, page, [])  # no logger: nothing to do


@pytest.mark.slow
def test_one_line_sends_all_runs_of_a_sweep(tmp_path):
    """README: `cd outputs && wandb sync --yes`; a continued job has left two pieces of one run."""
    for run_id in ("cell1", "cell2", "cell2", "cell3"):
        logger = wandb_logger(
            **{"project": "clipsae", "entity": None, "mode": "offline", "group": "night"},
            **{"tags": [], "name": run_id, "run_id": run_id, "job_type": "experiment"},
            **{"run_config": {}, "folder": tmp_path, "run_folder": tmp_path},
        )
        logger.log_metrics({"train/loss": 1.0}, step=1)
        finish(logger, failed=False)
    log = tmp_path / "asked.log"
    server = subprocess.Popen(
        [sys.executable, SERVER], stdout=subprocess.PIPE, stderr=log.open("w"), text=True
    )
    try:
        url = server.stdout.readline().strip()
        env = {**os.environ, "WANDB_BASE_URL": url, "WANDB_API_KEY": "0" * 40}
        env.pop("WANDB_MODE", None)
        sent = subprocess.run(
            *(["wandb", "sync", "--yes"],),
            **{"cwd": tmp_path, "env": env, "capture_output": True, "text": True, "timeout": 120},
        )
    finally:
        server.kill()
        server.wait()
    assert sent.returncode == 0, sent.stdout + sent.stderr
    asked = log.read_text()
    for run_id in ("cell1", "cell2", "cell3"):
        assert f"run {run_id} of group night" in asked
    assert (sent.stdout + sent.stderr).count("Finished syncing") == 4


class FakeRun:
    offline, dir = False, "x/files"

    def __init__(self) -> None:
        self.calls: list[object] = []

    def mark_preempting(self) -> None:
        self.calls.append("preempting")

    def finish(self, exit_code: int) -> None:
        self.calls.append(exit_code)


@pytest.fixture
def open_run(monkeypatch):
    run = FakeRun()
    monkeypatch.setattr(run_logging, "_open", [run])
    monkeypatch.setattr(run_logging.PatientWandbLogger, "experiment", run)
    return run


def fake_logger() -> run_logging.PatientWandbLogger:
    return run_logging.PatientWandbLogger.__new__(run_logging.PatientWandbLogger)


@pytest.mark.parametrize(
    ("ending", "calls"),
    [((False, False), [0]), ((True, False), [1]), ((True, True), ["preempting", 1])],
)
def test_a_run_ends_as_its_job_does(open_run, ending, calls):
    finish(fake_logger(), *ending)
    assert open_run.calls == calls
    finish(fake_logger(), *ending)  # once
    assert open_run.calls == calls


def test_runs_are_closed_before_a_job_is_queued_again(open_run):
    other = FakeRun()
    run_logging._open.append(other)
    run_logging.close_preempted()
    assert open_run.calls == other.calls == ["preempting", 1]
    finish(fake_logger(), True, True)
    assert open_run.calls == ["preempting", 1]

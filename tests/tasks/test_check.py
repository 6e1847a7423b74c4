"""`task=check` in good and in broken states, small."""

import json
import os
from itertools import permutations
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from PIL import Image

from clipsae.clip.tiny import weights_path
from clipsae.sae import SAE
from clipsae.store import Store
from clipsae.tasks.check import machine, steps
from clipsae.tasks.check.evaluations import Evaluating
from clipsae.tasks.check.findings import FAILS, OK, WARNING, Findings
from clipsae.tasks.check.forecast import Work, makespan
from clipsae.tasks.stages.evaluation import counts_first
from clipsae.training.density import set_density
from run import ROOT
from tests.warm import run_py

SMALL = [
    "task=check",
    "task.json=true",
    "task.seconds=0.01",
    "model.latents=64",
    "trainer.max_steps=4",
    "features.batch_size=4",
    "features.num_workers=0",
    "measurement.metrics=[sparsity,cknna]",
    "measurement.sample_tokens=200",
    "logger=none",
]
SWEEP = ["-m", "model=topk,batch_topk", "dataset=scenes_shape,scenes_colour"]


def checked(folder: Path, *overrides: str, **options):
    """The lines by what they check, and the exit status."""
    multirun = [o for o in overrides if o == "-m"]
    overrides = [o for o in overrides if o != "-m"]
    done = run_py(*multirun, *SMALL, f"paths.output_dir={folder / 'out'}", *overrides, **options)
    assert done.stdout, done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    assert not (folder / "out").exists()  # nothing is written there
    found: dict[str, list[dict]] = {}
    for line in json.loads(done.stdout)["lines"]:
        found.setdefault(line["check"], []).append(line)
    return found, done.returncode


def failing(lines: dict[str, list[dict]]) -> dict[str, str]:
    return {
        k: line["found"] for k, some in lines.items() for line in some if line["verdict"] == FAILS
    }


@pytest.fixture(scope="module")
def cfg():
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return compose("config", ["model=topk", "model.latents=64", "model.k=4"])


@pytest.mark.slow
def test_a_sweep_that_can_run(tmp_path):
    lines, status = checked(tmp_path, *SWEEP, "++train_dataset.size=40", "dataset.size=40")
    assert status == 0
    assert set(lines) == {
        *("options", "versions", "device", "disk", "W&B", "CLIP", "zero-shot", "forecast"),
        *("dataset scenes", "dataset scenes_shape", "dataset scenes_colour"),
        *(
            "step topk k=20",
            "step batch_topk k=20",
            "training topk k=20",
            "training batch_topk k=20",
        ),
        *(["shorter"] if "shorter" in lines else []),
    }
    (forecast,) = lines["forecast"]
    assert forecast["found"].startswith("2 trainings, 4 evaluations: ")
    trainings = [
        lines[f"training {name} k=20"][0]["numbers"]["seconds"] for name in ("topk", "batch_topk")
    ]
    # One after the other it is their sum and more, side by side at least the longer one.
    assert forecast["numbers"]["places_1"] > sum(trainings)
    assert forecast["numbers"]["places_1"] > forecast["numbers"]["places_8"] > max(trainings)
    assert lines["zero-shot"][0]["numbers"]["accuracy"] > 90


@pytest.mark.slow
def test_everything_that_is_wrong_is_said_at_once(tmp_path):
    half = tmp_path / "half.safetensors"
    half.write_bytes(weights_path().read_bytes()[:100_000])
    away = {k: v for k, v in os.environ.items() if not k.startswith("WANDB_")}
    lines, status = checked(
        tmp_path,
        *("-m", "model=topk", "model.k=16,65", "dataset=scenes_shape,dtd"),
        *("logger=wandb", "logger.mode=online", f"clip.pretrained={half}", "train_dataset=scenes"),
        *("resources.gpus=1", f"paths.data_dir={tmp_path}"),
        env=away | {"HOME": str(tmp_path)},
    )
    assert status == 1
    wrong = failing(lines)
    assert set(wrong) == {"options", "dataset dtd", "W&B", "CLIP"}
    assert "k=65" in wrong["options"]
    assert [len(line["jobs"]) for line in lines["options"]] == [2]  # on both datasets
    assert "DTD is not in" in wrong["dataset dtd"]
    assert "does not hold the weights of clipsae-tiny" in wrong["CLIP"]
    # What can be measured is, with random weights.
    assert lines["step topk k=16"][0]["verdict"] == OK
    assert lines["forecast"][0]["found"].endswith("3 of 4 jobs are not in it")


@pytest.mark.slow
def test_a_single_run_with_an_image_that_cannot_be_read_and_weights_of_another_model(tmp_path):
    for name in ("a", "b"):
        for i in range(8):
            file = tmp_path / "images" / name / f"{i}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (32, 32), (30 * i, 0, 0)).save(file)
    file.write_bytes(b"no image")
    other = tmp_path / "other.pt"
    torch.save({"visual.proj": torch.zeros(3, 3)}, other)
    lines, status = checked(
        tmp_path,
        *("model=topk", "dataset=image_folder", f"dataset.root={tmp_path / 'images'}"),
        *(f"clip.pretrained={other}", "features.batch_size=2", "task.seconds=1"),
    )
    assert status == 1
    wrong = failing(lines)
    assert "1 of 16 images cannot be read" in wrong["dataset image_folder"]
    assert str(file) in wrong["dataset image_folder"]
    assert "does not hold the weights" in wrong["CLIP"]


@pytest.mark.slow
def test_k_that_nothing_is_there_to_learn_from(tmp_path):
    auto = ("-m", "model=topk", "model.k=auto,4", "evaluation=none")
    lines, status = checked(tmp_path, *auto)
    assert status == 1
    assert "no finished Sparsemax SAE" in failing(lines)["options"]
    assert lines["forecast"][0]["found"].endswith("1 of 2 jobs are not in it")


def test_a_full_disk(tmp_path, cfg, monkeypatch):
    cfg = OmegaConf.merge(cfg, {"paths": {"output_dir": str(tmp_path)}})
    trained = Store(tmp_path).stage("sae", ["x"], {})
    job = SimpleNamespace(name="a", cfg=cfg, clip=SimpleNamespace(width=128), trained=trained)
    # Encoder, decoder and two biases in float32, counters of silence; with 4 places as one job has
    # no more than one: the SAE, and two checkpoints of three times its size.
    size = 4 * (2 * 64 * 128 + 64 + 128) + 8 * 64
    for free, verdict in ((1e12, OK), (99e6, FAILS)):
        monkeypatch.setattr(machine, "free_bytes", lambda folder, free=free: free)
        findings = Findings()
        machine.disk([job], 4, findings)
        assert findings.verdict == verdict
    assert machine.sae_bytes(job) == size


@pytest.mark.parametrize(
    ("mode", "login", "verdict"),
    [("online", False, FAILS), (None, False, WARNING), (None, True, OK), ("offline", False, OK)],
)
def test_no_login_fails_where_one_is_asked_for(cfg, monkeypatch, mode, login, verdict):
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setattr(machine, "logged_in", lambda: login)
    findings = Findings()
    machine.wandb(OmegaConf.merge(cfg, {"logger": {"mode": mode}}), findings)
    assert findings.verdict == verdict


@pytest.mark.parametrize("refuses", [False, True])
def test_slurm_is_asked_whether_it_would_take_a_job(cfg, tmp_path, monkeypatch, refuses):
    sbatch = tmp_path / "sbatch"
    sbatch.write_text(
        f'#!/bin/sh\necho "sbatch: error: invalid account; $*" >&2\nexit {int(refuses)}\n'
    )
    sbatch.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    names = ("account", "qos", "constraint", "gpus_per_node", "mem_gb")
    launcher = {**dict.fromkeys(names), "partition": "gpu", "timeout_min": 600, "nodes": 1}
    launcher |= {"tasks_per_node": 1, "cpus_per_task": 8}
    findings = Findings()
    machine.slurm(cfg, OmegaConf.create(launcher), findings)
    (line,) = findings.lines
    assert line.verdict == (FAILS if refuses else OK)
    assert "--test-only --partition=gpu --time=600 --nodes=1" in line.found
    assert "invalid account" in line.found


@pytest.mark.parametrize(
    "options",
    [
        *({"activation": name} for name in ("relu", "topk", "sparsemax", "gated")),
        {"activation": "topk", "target_layer": -1, "subtract_bias": False},
        {"activation": "relu", "monosemanticity": 0.1},
    ],
)
def test_a_machine_that_miscalculates_is_found(cfg, options):
    torch.manual_seed(0)
    sae = SAE(d=16, latents=64, **options)
    tokens = torch.randn(2, 8, 16)
    assert steps.distance(cfg, sae, tokens) < steps.TOLERANCES["float32"]

    def wrong(module, inputs):
        (x,) = inputs
        return (x * 1.01,) if x.dtype == torch.float32 else None

    sae.register_forward_pre_hook(wrong)
    assert steps.distance(cfg, sae, tokens) > steps.TOLERANCES["float32"]


def test_the_timed_steps_are_as_sparse_as_asked(cfg):
    tokens = torch.randn(4, 50, 32)
    for name in ("relu", "jumprelu", "gated", "sparsemax"):
        sae = SAE(d=32, latents=512, activation=name)
        set_density(sae, tokens, 0.05)
        share = (sae.eval().encode(tokens) != 0).float().mean()
        assert share == pytest.approx(0.05, abs=0.02), name


def test_the_forecast_of_a_sweep_is_that_of_a_greedy_schedule():
    a, b = Path("a"), Path("b")
    trainings = {a: Work(10.0), b: Work(4.0)}
    works = trainings | {Path(f"{of}{i}"): Work(2.0, of) for of in (a, b) for i in range(3)}
    assert makespan(works, 1) == 10 + 4 + 6 * 2
    assert makespan(works, 2) == 10 + 3 * 2 - 2  # b's evaluations are over by then: a's on both
    assert makespan(works, 8) == 10 + 2
    assert makespan({}, 3) == 0
    # Without anything to wait for, two places cannot beat the best of all divisions by a half.
    seconds = [7.0, 5.0, 4.0, 3.0, 3.0]
    best = min(
        max(sum(order[:cut]), sum(order[cut:]))
        for order in permutations(seconds)
        for cut in range(6)
    )
    found = makespan({Path(str(i)): Work(s) for i, s in enumerate(seconds)}, 2)
    assert best <= found <= 4 / 3 * best


def test_what_several_jobs_have_in_common_is_one_line(capsys):
    findings = Findings()
    for job in ("x", "y", "z"):
        with findings.attempt("options", job):
            raise ValueError("one\ntwo")
    findings.add("disk", OK, "room")
    (first, _) = findings.lines
    assert (first.jobs, first.found) == (["x", "y", "z"], "ValueError: one two")
    findings.show(as_json=False)
    assert "x, y and 1 more: ValueError: one two" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("protocol", "ranking", "settings", "first"),
    [
        ("paper", "frequency", ["no_sae", "on"], False),
        ("paper", "contrast", ["no_sae", "on"], True),
        ("heldout", "frequency", ["self"], True),
        ("heldout", "contrast", ["no_sae"], False),
    ],
)
def test_a_pass_that_counts_first_costs_its_images(protocol, ranking, settings, first):
    options = {"protocol": protocol, "ranking": ranking, "settings": settings}
    assert counts_first(OmegaConf.create({"evaluation": options})) == first
    cost = Evaluating(image=2.0, sampled=0.5, once=1.0, images=8)
    assert cost.seconds(10, 4) == 10 * 2 + 4 * 0.5 + 1
    assert cost.seconds(10, 4, counted=30) == 40 * 2 + 4 * 0.5 + 1

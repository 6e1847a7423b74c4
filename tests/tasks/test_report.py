"""`task=report` as a user runs it."""

import json
import subprocess
from pathlib import Path

import pandas as pd
import pytest
import yaml

from tests.warm import run_py


def report(folder: Path, *overrides: str) -> subprocess.CompletedProcess:
    return run_py("task=report", f"paths.output_dir={folder}", *overrides)


def evaluation(root: Path, model: str, dataset: str, accuracy: float, **more) -> None:
    """A finished evaluation of the built-in CLIP, as the experiment writes it."""
    folder = root / "evaluation" / f"{model}-{dataset}-{more.get('seed', 0)}"
    folder.mkdir(parents=True)
    rows = [
        {
            "model": model,
            "dataset": dataset,
            "clip": "clipsae-tiny",
            "latents": 2048,
            "k": more.get("k"),
            "seed": more.get("seed", 0),
            "protocol": "paper",
            "setting": setting,
            "n": n,
            "accuracy": accuracy,
            "micro_accuracy": accuracy,
            "images": 100,
            "classes": 8,
        }
        for setting, n in (("no_sae", None), ("on", 5), ("on", 2048))
    ]
    pd.DataFrame(rows).to_csv(folder / "results.csv", index=False)
    about = {**rows[0], "image_encoder": "tiny", "pooling": "mean"}
    numbers = {"zero_fraction": 0.9, "l0": 5.0, "fvu": 0.1}.items()
    pd.DataFrame([{**about, "metric": m, "value": v} for m, v in numbers]).to_csv(
        folder / "metrics.csv", index=False
    )
    config = {"clip": {"name": "clipsae-tiny", "pretrained": "builtin", "layer": -2}}
    if dataset == "photos":
        target = "clipsae.data.ImageFolder"
        config["dataset"] = {"_target_": target, "name": "photos", "root": "/my/photos"}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "meta.json").write_text(json.dumps({"finished": 1.0}))


@pytest.mark.slow
def test_a_report_from_the_command_line(tmp_path):
    out = tmp_path / "out"
    evaluation(out, "relu", "scenes_shape", 40.0)
    evaluation(out, "topk", "scenes_shape", 44.0, k=16, seed=0)
    evaluation(out, "topk", "scenes_shape", 46.0, k=16, seed=1)
    evaluation(out, "relu", "scenes_colour", 60.0)
    evaluation(out, "relu", "photos", 50.0)
    done = report(out, "logger.mode=offline", "evaluation.batch_size=16")
    assert done.returncode == 0, done.stderr
    page = out / "report" / "index.html"
    assert page.is_file()
    assert str(page) in done.stdout
    assert "Average over 3 datasets" in done.stdout
    assert "50.00" in done.stdout  # ReLU's mean of 40, 50 and 60
    assert "45.00" in done.stdout  # TopK's mean over seeds
    missing = (out / "report" / "missing.md").read_text()
    command = (
        "python run.py model=sparsemax dataset=scenes_shape clip=tiny "
        f"paths.output_dir={out} evaluation.batch_size=16 seed=0"
    )
    assert command in missing.splitlines()
    of_photos = "dataset=image_folder dataset.root=/my/photos dataset.name=photos"
    assert f"model=gated {of_photos} clip=tiny" in missing

    # The same tables lie in an offline W&B run of its own kind.
    (record,) = (out / "wandb").glob("offline-run-*/*.wandb")
    read = subprocess.run(
        ["wandb", "leet", "inspect", record, "--summary", "--json"], capture_output=True, text=True
    )
    assert read.returncode == 0, read.stderr
    summary = json.dumps(json.loads(read.stdout))
    assert "accuracy_scenes_shape" in summary, done.stdout + done.stderr
    (table,) = record.parent.glob("files/media/table/accuracy_scenes_shape_*.table.json")
    content = json.loads(table.read_text())
    assert content["columns"][:4] == ["model", "no_sae", "on_5", "on_5_std"]
    assert content["data"][3][0] == "TopK (k = 16)"
    assert content["data"][3][2] == 45.0

    # The same tables are not logged twice; a result more is logged as another run.
    again = report(out, "logger.mode=offline", "evaluation.batch_size=16")
    assert "these tables are in W&B already" in again.stdout + again.stderr
    assert len(list((out / "wandb").glob("offline-run-*"))) == 1


@pytest.mark.slow
def test_nothing_to_report_is_one_sentence_with_the_command_to_run_first(tmp_path):
    done = report(tmp_path / "out", "logger=none", "evaluation.protocol=heldout")
    assert done.returncode == 1
    (line,) = [line for line in done.stderr.splitlines() + done.stdout.splitlines() if line]
    assert str(tmp_path / "out" / "evaluation") in line
    assert (
        "run `python run.py model=sparsemax dataset=scenes_shape_colour clip=tiny "
        f"paths.output_dir={tmp_path / 'out'} evaluation.protocol=heldout seed=0` first"
    ) in line
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_results_of_another_size_are_named_with_the_overrides_that_report_them(tmp_path):
    evaluation(tmp_path / "out", "relu", "scenes_shape", 40.0)
    done = report(tmp_path / "out", "logger=none", "model.latents=64")
    assert done.returncode == 1
    said = done.stderr + done.stdout
    assert "model.latents=2048" in said
    assert "with 64 latents" in said
    done = report(tmp_path / "out", "logger=none", "task.models=[spasemax]")
    assert done.returncode == 1
    assert "task.models has 'spasemax': expected names among attention_relu" in (
        done.stderr + done.stdout
    )

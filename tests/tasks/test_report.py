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
    cell = {"model": model, "dataset": dataset, "clip": "clipsae-tiny", "latents": 512}
    cell |= {"k": more.get("k"), "seed": more.get("seed", 0), "images": 100}
    way = {"protocol": "paper", "ranking": "contrast"}
    topn = cell | way | {"accuracy": accuracy, "classes": 8}
    settings = (("no_sae", None), ("on", 5), ("on", 512))
    rows = [{**topn, "setting": setting, "n": n} for setting, n in settings]
    pd.DataFrame(rows).to_csv(folder / "results.csv", index=False)
    cell |= {"image_encoder": "tiny", "pooling": "mean"}
    numbers = {"zero_fraction": 0.9, "l0": 5.0, "fvu": 0.1}.items()
    rows = [{**cell, "metric": m, "value": v} for m, v in numbers]
    pd.DataFrame(rows).to_csv(folder / "metrics.csv", index=False)
    config = {"clip": {"name": "clipsae-tiny", "pretrained": "builtin", "layer": -2}}
    if dataset == "photos":
        target = "clipsae.data.ImageFolder"
        config["dataset"] = {"_target_": target, "name": "photos", "root": "/my/photos"}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    key = {"measurement": {"threshold": more.get("threshold", 0.9)}}
    (folder / "meta.json").write_text(json.dumps({"finished": 1.0, "key": key}))


@pytest.mark.slow
def test_a_report_from_the_command_line(tmp_path):
    out = tmp_path / "out"
    evaluation(out, "relu", "scenes_shape", 40.0)
    evaluation(out, "topk", "scenes_shape", 44.0, k=16, seed=0)
    evaluation(out, "topk", "scenes_shape", 46.0, k=16, seed=1)
    evaluation(out, "relu", "scenes_colour", 60.0)
    evaluation(out, "relu", "photos", 50.0)
    evaluation(out, "relu", "photos", 50.0, seed=1, threshold=0.8)
    given = ("logger.mode=offline", "evaluation.batch_size=16", "measurement.threshold=0.9")
    done = report(out, *given)
    assert done.returncode == 0, done.stderr
    page = out / "report" / "index.html"
    assert page.is_file()
    assert str(page) in done.stdout
    assert "Average over 3 datasets" in done.stdout
    assert "50.00" in done.stdout  # ReLU's mean of 40, 50 and 60
    assert "45.00" in done.stdout  # TopK's mean over seeds
    # By the override of the measurement one result is left out.
    assert "1 result is excluded" in done.stdout
    missing = (out / "report" / "missing.md").read_text()
    command = f"dataset=scenes_shape clip=tiny paths.output_dir={out} {' '.join(given[1:])} seed=0"
    assert f"python run.py model=sparsemax {command}" in missing.splitlines()
    of_photos = "dataset=image_folder dataset.root=/my/photos dataset.name=photos"
    assert f"model=gated {of_photos} clip=tiny" in missing

    # The same tables lie in an offline W&B run of its own kind.
    (folder,) = (out / "wandb").glob("offline-run-*")
    assert list(folder.glob("*.wandb"))
    (table,) = folder.glob("files/media/table/accuracy_scenes_shape_*.table.json")
    content = json.loads(table.read_text())
    assert content["columns"][:4] == ["model", "no_sae", "on_5", "on_5_std"]
    assert content["data"][3][0] == "TopK (k = 16)"
    assert content["data"][3][2] == 45.0

    # The same tables are not logged twice.
    again = report(out, *given)
    assert "these tables are in W&B already" in again.stdout + again.stderr
    assert len(list((out / "wandb").glob("offline-run-*"))) == 1


@pytest.mark.slow
def test_what_there_is_nothing_to_report_on_is_one_sentence_with_what_to_do(tmp_path):
    out = tmp_path / "out"
    done = report(out, "logger=none", "evaluation.protocol=heldout")
    assert done.returncode == 1
    (line,) = [line for line in done.stderr.splitlines() + done.stdout.splitlines() if line]
    assert str(out / "evaluation") in line
    assert (
        "run `python run.py model=sparsemax dataset=scenes_shape_colour clip=tiny "
        f"paths.output_dir={out} evaluation.protocol=heldout seed=0` first"
    ) in line
    evaluation(out, "relu", "scenes_shape", 40.0)
    for override, *says in (
        ("model.latents=64", "with 64 latents", "report on what is there with model.latents=512"),
        ("task.models=[spasemax]", "task.models has 'spasemax': expected names among abs_topk, at"),
    ):
        done = report(out, "logger=none", override)
        assert done.returncode == 1
        assert all(said in done.stderr + done.stdout for said in says)

"""Where numbers go: what a run wrote is not removed by a later one; W&B's variables hold."""

import csv
from pathlib import Path

import pytest

from clipsae.training import logging as run_logging
from clipsae.training.logging import csv_logger, has_rows, has_run, wandb_logger


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def write(folder: Path, *told: dict[str, float]) -> None:
    logger = csv_logger(run_folder=folder)
    for step, values in enumerate(told):
        logger.log_metrics(values, step=step)
        logger.save()
    logger.finalize("success")


def test_a_later_run_adds_its_rows(tmp_path):
    assert not has_rows(tmp_path)
    write(tmp_path, {"loss": 1.0}, {"loss": 0.5})
    assert has_rows(tmp_path)
    write(tmp_path, {"loss": 0.25})
    write(tmp_path, {"accuracy": 90.0}, {"loss": 0.125})  # another column
    found = rows(tmp_path)
    assert [row["loss"] for row in found] == ["1.0", "0.5", "0.25", "", "0.125"]
    assert [row["accuracy"] for row in found] == ["", "", "", "90.0", ""]
    assert [row["step"] for row in found] == ["0", "1", "0", "0", "1"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.csv"]


def test_a_job_without_numbers_leaves_the_file_as_it_was(tmp_path):
    write(tmp_path, {"loss": 1.0})
    before = (tmp_path / "metrics.csv").read_bytes()
    write(tmp_path)
    assert (tmp_path / "metrics.csv").read_bytes() == before


def test_a_kill_while_a_column_is_added_leaves_the_rows(tmp_path, monkeypatch):
    write(tmp_path, {"loss": 1.0}, {"loss": 0.5})

    def killed(self, rows):
        raise SystemExit(137)

    monkeypatch.setattr(csv.DictWriter, "writerows", killed)
    with pytest.raises(SystemExit):
        write(tmp_path, {"accuracy": 90.0})
    assert [row["loss"] for row in rows(tmp_path)] == ["1.0", "0.5"]


OPTIONS = {
    **{"project": "clipsae", "entity": None, "group": None, "tags": [], "name": "it"},
    **{"run_id": "r1", "job_type": "train", "run_config": {}},
}


@pytest.mark.parametrize(
    ("mode", "variables", "expected"),
    [
        ("disabled", {}, "disabled"),
        (None, {"WANDB_MODE": "disabled"}, "disabled"),
        (None, {"WANDB_DISABLED": "true"}, "disabled"),
        (None, {"WANDB_MODE": "offline"}, "offline"),
        (None, {"WANDB_MODE": "dryrun"}, "offline"),
        ("offline", {"WANDB_MODE": "disabled"}, "offline"),  # what is asked for here comes first
        (None, {}, "offline"),  # no login
    ],
)
def test_the_variables_of_wandb_hold(tmp_path, monkeypatch, mode, variables, expected):
    import wandb

    class Run:
        dir = str(tmp_path / "wandb" / "offline-run-x-r1" / "files")
        settings = None

    begun = []
    monkeypatch.setattr(wandb, "init", lambda **options: begun.append(options["mode"]) or Run())
    monkeypatch.setattr(run_logging, "logged_in", lambda: False)
    monkeypatch.setattr(run_logging, "PatientWandbLogger", lambda experiment: Run())
    monkeypatch.setattr(run_logging, "_open", [])
    for name in ("WANDB_MODE", "WANDB_DISABLED", "WANDB_SWEEP_ID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    logger = wandb_logger(mode=mode, folder=tmp_path, run_folder=tmp_path, **OPTIONS)
    assert begun == ([] if expected == "disabled" else [expected])
    assert (logger is None) == (expected == "disabled")
    assert (tmp_path / "wandb").exists() is False


def test_an_unknown_mode_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "nonsense")
    with pytest.raises(ValueError, match="mode='nonsense'"):
        wandb_logger(mode=None, folder=tmp_path, run_folder=tmp_path, **OPTIONS)


def test_a_run_that_was_begun_before_is_known(tmp_path):
    assert not has_run(tmp_path, "r1")
    (tmp_path / "wandb" / "offline-run-20261128_101010-r12").mkdir(parents=True)
    assert not has_run(tmp_path, "r1")
    (tmp_path / "wandb" / "run-20261128_101010-r1").mkdir()
    assert has_run(tmp_path, "r1")

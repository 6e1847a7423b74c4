"""`together=true` as a user runs it."""

import signal
import time
from pathlib import Path

import pandas as pd
import pytest

from tests.warm import run_py, start_py

SMALL = [
    "model.latents=128",
    "trainer.max_steps=12",
    "trainer.log_every_n_steps=4",
    "trainer.val_check_interval=6",
    "trainer.limit_val_batches=1",
    "features.batch_size=4",
    "dataset.size=40",
    "evaluation.settings=[no_sae,on]",
    "measurement=none",
    "logger=csv",
]


def sweep_of(folder: Path, *more: str) -> list[str]:
    return ["-m", *SMALL, *more, f"paths.output_dir={folder}"]


@pytest.mark.slow
def test_results_are_those_of_each_alone_and_what_fails_harms_no_other(tmp_path):
    cells = [
        "model=relu,topk",
        "optimizer.learning_rate=1e-3,1e38",
        "dataset=scenes_shape,scenes_colour",
    ]
    runs = {
        name: start_py(*sweep_of(tmp_path / name, *cells, f"together={name == 'shared'}"))
        for name in ("shared", "alone")
    }
    said = {name: run.communicate()[0] for name, run in runs.items()}
    for name, run in runs.items():
        assert run.returncode == 1, said[name]
        assert "4 of 8 jobs failed" in said[name]
        assert "the loss became NaN or infinite" in said[name]
        assert "Traceback" not in said[name]
    shared, alone = (
        {
            path.relative_to(tmp_path / name).as_posix(): path.read_bytes()
            for kind in ("sae/[!.]*/sae.safetensors", "evaluation/[!.]*/results.csv")
            for path in (tmp_path / name).glob(kind)
        }
        for name in ("shared", "alone")
    )
    assert len(alone) == 2 + 4
    assert shared == alone
    # Each cell's own folder has its own log and curves, as alone.
    files = (tmp_path / "shared").glob("sweeps/*/*/clipsae.log")
    logs = {path.parent: path.read_text() for path in files}
    assert len(logs) == 8
    done = [folder for folder, text in logs.items() if "became NaN" not in text]
    assert len(done) == 4
    trained = [folder for folder in done if "training" in logs[folder]]
    assert sorted(logs[folder].count("training") for folder in trained) == [1, 1]
    for folder in trained:
        curves = pd.read_csv(folder / "metrics.csv")
        assert curves["train/loss"].notna().sum() == 3
        assert curves["topn/on_128"].notna().sum() == 1


@pytest.mark.slow
def test_ctrl_c_saves_all_and_the_same_command_continues(tmp_path):
    sweep = ["model=relu,topk", "together=true", "trainer.max_steps=200"]
    process = start_py(*sweep_of(tmp_path, *sweep, "callbacks.checkpoint_every_n_steps=10"))
    while not list(tmp_path.glob("sae/.*/*/scratch/last.ckpt")):
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=100)
    assert process.returncode == 130, said
    assert "interrupted: the same command goes on" in said
    assert "Traceback" not in said
    assert len(list(tmp_path.glob("sae/.*/free/scratch/last.ckpt"))) == 2
    again = run_py(*sweep_of(tmp_path, *sweep), check=True)
    assert again.stdout.count("continuing the training") == 2

"""What ends a job before its time: Ctrl-C, NaN in the loss."""

import os
import re
import signal
import time
from pathlib import Path

import pytest

from clipsae.store.files import read_json
from tests.warm import run_py, start_py

SMALL = [
    "model=relu",
    "model.latents=128",
    "trainer.accelerator=cpu",
    "trainer.log_every_n_steps=5",
    "trainer.val_check_interval=50",
    "trainer.limit_val_batches=1",
    "features.batch_size=4",
    "dataset=scenes_shape",
    "dataset.size=40",
    "evaluation.settings=[no_sae,on]",
    "measurement=none",
    "logger=none",
]


# Ctrl-C in the midst of a step.
CTRL_C = """
import os, signal
from clipsae.training.module import SAEModule

step = SAEModule.training_step

def training_step(self, *args):
    if str(self.global_step) == os.environ.get("CTRL_C"):
        os.kill(os.getpid(), signal.SIGINT)
    return step(self, *args)

SAEModule.training_step = training_step
"""


def job(folder: Path, *more: str) -> list[str]:
    return [f"paths.output_dir={folder}", *SMALL, *more]


def weights(folder: Path) -> bytes:
    (file,) = folder.glob("sae/[!.]*/sae.safetensors")
    return file.read_bytes()


@pytest.mark.slow
def test_ctrl_c_ends_cleanly_and_the_same_command_continues(tmp_path):
    more = ["trainer.max_steps=200", "callbacks.checkpoint_every_n_steps=10"]
    process = start_py(*job(tmp_path / "cut", *more))
    while not list((tmp_path / "cut").glob("sae/.*/*/scratch/last.ckpt")):
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert "interrupted: the same command goes on" in said
    assert "Traceback" not in said
    again, whole = (
        run_py(*job(tmp_path / name, *more), check=True).stdout for name in ("cut", "whole")
    )
    assert "continuing the training" in again
    assert "continuing the training" not in whole
    assert weights(tmp_path / "cut") == weights(tmp_path / "whole")


@pytest.mark.slow
def test_ctrl_c_saves_where_no_checkpoint_was_due(tmp_path):
    """With the usual 500 steps between checkpoints."""
    plugin = tmp_path / "ctrl_c.py"
    plugin.write_text(CTRL_C)
    more = ["trainer.max_steps=40", f"plugins=[{plugin}]"]
    done = run_py(*job(tmp_path / "cut", *more), env={**os.environ, "CTRL_C": "23"})
    said = done.stdout + done.stderr
    assert done.returncode == 130, said
    assert "Traceback" not in said
    assert "Ctrl-C: saving after this step" in said
    assert "stopped at step 24 of 40: the checkpoint of step 24 is in" in said
    again, whole = (
        run_py(*job(tmp_path / name, *more), check=True).stdout for name in ("cut", "whole")
    )
    assert "from step 24" in again
    assert "continuing the training" not in whole
    assert weights(tmp_path / "cut") == weights(tmp_path / "whole")


@pytest.mark.slow
def test_a_training_that_ends_early_is_not_finished(tmp_path):
    early = "max_time=00:00:00:00"
    more = [*job(tmp_path, "trainer.max_steps=20"), "evaluation=none"]
    done = run_py(*more, f"+trainer.{early}")
    assert done.returncode == 1
    said = done.stdout + done.stderr
    assert re.search(r"is not finished: Lightning ended its training after \d+ of 20 steps", said)
    assert f"(trainer.{early})" in said
    assert not list(tmp_path.glob("sae/[!.]*"))
    assert run_py(*more).returncode == 0
    (file,) = tmp_path.glob("sae/[!.]*/training.json")
    assert read_json(file)["steps"] == 20


@pytest.mark.slow
def test_nan_in_the_loss_ends_with_a_sentence(tmp_path):
    # At such a rate the weights overflow after some steps.
    done = run_py(
        *job(
            tmp_path,
            "trainer.max_steps=400",
            "optimizer.learning_rate=1e17",
            "optimizer.warmup_steps=100",
            "callbacks.checkpoint_every_n_steps=1",
        )
    )
    assert done.returncode == 1
    said = done.stdout + done.stderr
    assert "Traceback" not in said, said
    assert "the loss became NaN or infinite at step" in said
    assert "at a learning rate of" in said
    assert "the last good checkpoint is" in said
    assert not list(tmp_path.glob("sae/[!.]*"))

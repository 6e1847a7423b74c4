"""What ends a job before its time: Ctrl-C, NaN in the loss."""

import os
import re
from pathlib import Path

import pytest

from clipsae.store.files import read_json
from tests.warm import run_py

SMALL = [
    "model=relu",
    "optimizer.sparsity_warmup_steps=15",
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


# A plugin that sends Ctrl-C in the middle of a step.
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


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The weights after 40 steps without an interruption."""
    folder = tmp_path_factory.mktemp("whole")
    printed = run_py(*job(folder, "trainer.max_steps=40"), check=True).stdout
    assert "continuing the training" not in printed
    return weights(folder)


@pytest.mark.slow
@pytest.mark.parametrize("every", [10, 500], ids=["after a checkpoint", "before the first"])
def test_ctrl_c_saves_a_checkpoint_and_the_same_command_continues(tmp_path, whole, every):
    plugin = tmp_path / "ctrl_c.py"
    plugin.write_text(CTRL_C)
    command = job(
        tmp_path / "cut",
        "trainer.max_steps=40",
        f"callbacks.checkpoint_every_n_steps={every}",
        f"plugins=[{plugin}]",
    )
    done = run_py(*command, env={**os.environ, "CTRL_C": "23"})
    printed = done.stdout + done.stderr
    assert done.returncode == 130, printed
    assert "Traceback" not in printed
    assert "Ctrl-C: saving after this step" in printed
    assert "stopped at step 24 of 40: the checkpoint of step 24 is in" in printed
    again = run_py(*command, check=True).stdout
    assert "from step 24" in again
    assert weights(tmp_path / "cut") == whole


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

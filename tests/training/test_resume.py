"""A real process, a real signal: the continued run ends with the weights of one undisturbed."""

import contextlib
import signal
import time
from pathlib import Path

import pytest

from tests.warm import run_py, start_py

OVERRIDES = [
    "model=batch_topk",  # thresholds, counters of dead latents, projected gradients: much to keep
    "model.latents=256",
    "model.threshold_start_step=5",
    "trainer.max_steps=60",
    "trainer.val_check_interval=25",
    "trainer.limit_val_batches=1",
    "callbacks.checkpoint_every_n_steps=4",
    "callbacks.progress_bar=false",
    "features.batch_size=4",
    "features.num_workers=0",
    "dataset=scenes_colour",
    "dataset.size=40",
    "evaluation.settings=[no_sae,on]",
    "measurement=none",
    "logger=none",
]


def job(folder: Path, *more: str) -> list[str]:
    return [f"paths.output_dir={folder}", *OVERRIDES, *more]


def weights(folder: Path) -> bytes:
    (file,) = folder.glob("sae/*/sae.safetensors")
    return file.read_bytes()


def results(folder: Path) -> str:
    (file,) = folder.glob("evaluation/*/results.csv")
    return file.read_text()


def checkpoint_times(folder: Path) -> list[float]:
    with contextlib.suppress(FileNotFoundError):  # its folder has just changed hands
        return [file.stat().st_mtime for file in folder.glob("sae/.*/*/scratch/last.ckpt")]
    return []


def kill_and_continue(tmp_path: Path, *more: str) -> None:
    """whole/ is an undisturbed job; cut/ the same, ended twice by a signal, and continued."""
    run_py(*job(tmp_path / "whole", *more), check=True)

    for sign in (signal.SIGKILL, signal.SIGTERM):
        seen = 0.0
        process = start_py(*job(tmp_path / "cut", *more))
        while process.poll() is None:  # until a checkpoint of this run is there, then no mercy
            times = checkpoint_times(tmp_path / "cut")
            if times and seen and times[0] > seen:
                process.send_signal(sign)
                break
            seen = times[0] if times else seen
            time.sleep(0.01)
        assert process.wait(60) != 0, process.stdout.read()
        assert not list((tmp_path / "cut").glob("sae/[!.]*"))

    last, again = (run_py(*job(tmp_path / "cut", *more), check=True).stdout for _ in range(2))
    for kind in ("sae", "evaluation"):  # what is finished is used
        assert f"using the finished {tmp_path}/cut/{kind}/" not in last
        assert f"using the finished {tmp_path}/cut/{kind}/" in again
    assert weights(tmp_path / "cut") == weights(tmp_path / "whole")
    assert results(tmp_path / "cut") == results(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("shuffle", [0, 16])
def test_killed_and_continued_equals_undisturbed(tmp_path, shuffle):
    kill_and_continue(tmp_path, f"features.shuffle_buffer_images={shuffle}")


@pytest.mark.slow
def test_a_damaged_checkpoint_is_named_and_the_training_begins_anew(tmp_path):
    run_py(*job(tmp_path / "whole"), check=True)
    process = start_py(*job(tmp_path / "cut"))
    while not checkpoint_times(tmp_path / "cut"):
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.wait()
    (file,) = (tmp_path / "cut").glob("sae/.*/*/scratch/last.ckpt")
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    again = run_py(*job(tmp_path / "cut"), check=True)
    assert "last.ckpt does not match its checksum" in again.stdout
    assert "continuing" not in again.stdout
    assert weights(tmp_path / "cut") == weights(tmp_path / "whole")

"""Disks that are full or read-only, under real runs. (tests/store has the store alone.)"""

import contextlib
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from PIL import Image

from tests.warm import run_py, start_py

JOB = [
    *("model=topk", "model.latents=256", "trainer.max_steps=40", "trainer.log_every_n_steps=10"),
    *("trainer.accelerator=cpu", "trainer.val_check_interval=20", "trainer.limit_val_batches=1"),
    *("callbacks.checkpoint_every_n_steps=2", "features.batch_size=4", "features.num_workers=0"),
    *("evaluation.settings=[no_sae,on]", "measurement=none", "logger=none"),
]
CACHED = [
    *("features=cached", "+train_dataset.size=90", "features.cache.shard_gb=0.0004"),
    *("features.block_images=4", "features.buffer_images=32"),
    *("dataset=scenes_colour", "dataset.size=400"),
]


def job(folder: Path, *overrides: str) -> list[str]:
    return [f"paths.output_dir={folder}", *JOB, *overrides]


def results(folder: Path) -> dict[str, bytes]:
    """The bytes that matter of every stage."""
    names = ("tokens-*", "sae.safetensors", "results.csv")
    return {
        file.name: file.read_bytes() for name in names for file in folder.glob(f"*/[!.]*/{name}")
    }


@pytest.fixture
def disk(tmp_path) -> Iterator[Path]:
    """A disk of 16 MiB in memory."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(folder)]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a file system cannot be mounted here")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(disk: Path) -> Path:
    """A file that takes all that is left."""
    ballast = disk / "ballast"
    with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:
        while file.write(bytes(4096)):
            pass
    return ballast


def being_made(kind: str, what: str) -> Callable[[Path], bool]:
    def begun(out: Path) -> bool:
        try:
            return any(out.glob(f"{kind}/.*.partial/*/{what}"))
        except FileNotFoundError:  # a folder went while it was looked into
            return False

    return begun


@pytest.mark.slow
def test_a_disk_that_fills_in_the_midst_of_a_run(tmp_path, disk):
    """While a shard, a checkpoint, a result is written: each time one sentence, and the same
    command goes on when there is space again."""
    out = disk / "out"
    moments = {
        "shards": being_made("shards", "staging"),
        "sae": being_made("sae", "scratch/last.ckpt"),
        "evaluation": being_made("evaluation", "staging"),
    }
    for kind, begun in moments.items():
        process = start_py(*job(out, *CACHED))
        while not begun(out):
            assert process.poll() is None, process.stdout.read()
            time.sleep(0.001)
        ballast = fill(disk)
        said, _ = process.communicate(timeout=200)
        assert process.returncode == 1, said
        # An evaluation begins with the classes' text embeddings.
        places = [kind, "classifier"] if kind == "evaluation" else [kind]
        assert any(f"{out / place}: no space left on the disk" in said for place in places), said
        assert "run the same command again" in said
        assert "Traceback" not in said, said
        assert not list(out.glob(f"{kind}/[!.]*/results.csv"))
        ballast.unlink()
    done = run_py(*job(out, *CACHED))
    assert done.returncode == 0, done.stderr
    whole = tmp_path / "whole"
    run_py(*job(whole, *CACHED), check=True)
    assert results(out) == results(whole)
    assert {"sae.safetensors", "results.csv"} < set(results(out))


@pytest.mark.slow
def test_images_on_a_disk_that_cannot_be_written_to(tmp_path, disk):
    for split in ("train", "test"):
        for number, name in enumerate(("red", "blue")):
            folder = disk / "photos" / split / name
            folder.mkdir(parents=True)
            for i in range(6):
                colour = (200 - 20 * i, 30, 20) if number else (20, 30, 200 - 20 * i)
                Image.new("RGB", (80, 70), colour).save(folder / f"{i}.png")
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    images = ["dataset=image_folder", f"dataset.root={disk / 'photos'}"]
    done = run_py(*job(tmp_path / "out", *images))
    assert done.returncode == 0, done.stdout + done.stderr
    assert set(results(tmp_path / "out")) == {"sae.safetensors", "results.csv"}

"""`task=visualize` as a user runs it, on SAEs with random weights where trained ones would be."""

import subprocess
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from PIL import Image

from clipsae.clip import FrozenCLIP
from clipsae.store import Store
from clipsae.tasks import build
from clipsae.tasks.stages import sae
from run import ROOT
from tests.warm import run_py

SMALL = ["model.latents=96", "dataset.size=24", "measurement.image_encoder=tiny"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A store with a TopK and a Sparsemax SAE of `SMALL`."""
    root = tmp_path_factory.mktemp("store")
    torch.manual_seed(0)
    width = FrozenCLIP.load("clipsae-tiny", "builtin").width
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        for model in ("topk", "sparsemax"):
            cfg = compose("config", [f"model={model}", *SMALL])
            train_set = build.build_dataset(cfg.train_dataset, "train", 64)
            new = build.build_sae(cfg, width)
            sae.stage(cfg, Store(root), train_set).make(new.save)
    return root


def run(folder: Path, *overrides: str) -> subprocess.CompletedProcess:
    return run_py("task=visualize", f"paths.output_dir={folder}", *SMALL, *overrides)


@pytest.mark.slow
def test_files_and_dataset_images_through_two_models(trained, tmp_path):
    photo = tmp_path / "a photo.png"
    Image.new("RGB", (90, 70), "red").save(photo)
    done = run(
        trained,
        "task.models=[topk,sparsemax]",
        f'task.images=["{photo}"]',
        "task.indices=[5]",
        "task.filter=none",
    )
    assert done.returncode == 0, done.stdout + done.stderr
    figures = sorted(trained.glob("figures/topk+sparsemax-*/*"))
    assert [path.suffix for path in figures] == [".pdf", ".png"] * 2
    assert any("test-00005" in path.name for path in figures)
    assert any("a photo" in path.name for path in figures)
    assert all(str(path) in done.stdout for path in figures if path.suffix == ".png")
    assert len(list(trained.glob("pictures/*/pictures.safetensors"))) == 2

    # What is there is used: the same pictures serve one model alone.
    again = run(trained, "model=topk", "task.indices=[5]")
    assert again.returncode == 0, again.stdout + again.stderr
    assert "collecting" not in again.stdout
    assert len(list(trained.glob("figures/topk-*/*.png"))) == 1


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["model=relu"], "run `python run.py model=relu"),
        (["model=topk", "task.images=[nowhere.jpg]"], "nowhere.jpg: no such file"),
        (["model=topk", "task.indices=[24]"], "expected 0 to 23"),
        (["model=topk", "task.filter=rare"], "frequency, strength or none"),
        (["task.models=[topkk]"], "topkk"),
        (["task.sae=nowhere", "task.models=[topk]"], "expected one of them"),
        (["logger.upload_sae=true"], "task=visualize uploads nothing"),
    ],
)
def test_what_cannot_be_is_one_sentence(trained, overrides, words):
    done = run(trained, *overrides)
    assert done.returncode != 0
    assert words in done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr

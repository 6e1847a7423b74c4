"""`task=explore` as a user runs it, on an SAE with random weights where a trained one would be."""

import json
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

from clipsae.clip import FrozenCLIP
from clipsae.errors import ConfigError
from clipsae.store import Store
from clipsae.tasks import build, explore
from clipsae.tasks.stages import sae
from run import ROOT
from tests.warm import run_py

SMALL = ["model=topk", "model.latents=96", "dataset.size=24", "task.pages=3"]
NO_TEXTS = [
    *("clip=dinov2_s_14", "clip.name=timm:vit_tiny_patch16_224", "clip.pretrained=null"),
    *("clip.image_size=64", "evaluation=none", "measurement=none"),
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A store with the SAE of `SMALL`."""
    root = tmp_path_factory.mktemp("store")
    make_sae(root, FrozenCLIP.load("clipsae-tiny", "builtin").width)
    return root


def composed(*overrides: str) -> DictConfig:
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return compose("config", ["task=explore", *SMALL, *overrides])


def make_sae(root: Path, width: int, overrides: Sequence[str] = ()) -> None:
    torch.manual_seed(0)
    cfg = composed(*overrides)
    train_set = build.build_dataset(build.train_dataset_node(cfg), "train", 64)
    new = build.build_sae(cfg, width)
    sae.stage(cfg, Store(root), train_set).make(new.save)


def run(folder: Path, *overrides: str) -> subprocess.CompletedProcess:
    return run_py("task=explore", f"paths.output_dir={folder}", *SMALL, *overrides)


def read(file: Path):
    """What a data script hands to the page."""
    text = file.read_text().strip()
    return json.loads(text[text.index(",") + 1 : -2])


@pytest.mark.slow
def test_a_page_with_words_of_the_world_and_again_without_pictures(trained, tmp_path, monkeypatch):
    done = run(trained)
    assert done.returncode == 0, done.stdout + done.stderr
    assert not (trained / "wandb").exists()
    (page,) = trained.glob("explore/*/index.html")
    assert str(page) in done.stdout
    folder = page.parent
    meta = read(folder / "data" / "meta.js")
    assert meta["latents"] == 96
    assert {"red", "ring", "striped", "grass"} <= set(meta["words"])
    assert [look["index"] for look in meta["looks"]] == [0, 8, 16]
    assert (folder / "thumbs/0/8.jpg").is_file()
    assert sorted(file.name for file in (folder / "images").iterdir()) == [
        "0.jpg",
        "16.jpg",
        "8.jpg",
    ]
    chunk = read(folder / "data/latents/0.js")
    assert len(chunk) == 64
    live = next(latent for latent in chunk if latent)
    assert len(live["near"]) == 8
    assert {"helps", "hurts", "words", "maps"} <= set(live)
    assert str(tmp_path.parent) not in (folder / "data" / "meta.js").read_text()

    words = tmp_path / "words.txt"
    words.write_text("red\nblue\n\nred\n")
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path))
    more = ["task.effect_images=0", "task.upload=true", "logger.mode=offline"]
    again = run(trained, "task.thumbnails=false", f"task.words={words}", *more)
    assert again.returncode == 0, again.stdout + again.stderr
    assert "collecting" not in again.stdout
    (file,) = trained.glob("wandb/offline-run-*/*.wandb")
    assert b"explore" in (told := file.read_bytes())
    assert folder.name.encode() in told
    assert not list(folder.glob("**/*.jpg"))
    assert read(folder / "data" / "meta.js")["words"] == ["red", "blue"]
    assert "helps" not in next(latent for latent in read(folder / "data/latents/0.js") if latent)
    assert not list(trained.glob("explore/.*"))


@pytest.mark.slow
def test_a_backbone_without_texts_has_a_page_without_predictions(tmp_path):
    make_sae(tmp_path, 192, NO_TEXTS)
    done = run(tmp_path, *NO_TEXTS)
    assert done.returncode == 0, done.stdout + done.stderr
    (page,) = tmp_path.glob("explore/*/index.html")
    meta = read(page.parent / "data" / "meta.js")
    assert meta["words"] == []
    assert {look["said"] for look in meta["looks"]} == {None}
    look = read(page.parent / "data/looks/8.js")
    assert look["tokens"]
    assert (look["clip"], look["sae"], look["why"]) == ([], [], [])
    live = next(latent for latent in read(page.parent / "data/latents/0.js") if latent)
    assert len(live["near"]) == 8
    assert not {"helps", "hurts"} & set(live)


@pytest.mark.filterwarnings("ignore:.*RANDOM WEIGHTS")
@pytest.mark.parametrize(
    ("override", "words"),
    [("task.serve=true", "has no text tower"), ("task.words=red.txt", "leave it out")],
)
def test_what_needs_texts_is_refused_without_them(override, words):
    cfg = composed(*NO_TEXTS, override)
    with pytest.raises(ConfigError, match=words):
        explore.check_text(cfg, build.build_clip(cfg))


def test_an_upload_needs_a_logger_that_can():
    explore.check(composed("task.upload=true"))
    with pytest.raises(ConfigError, match="choose logger=wandb"):
        explore.check(composed("task.upload=true", "logger=csv"))


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["model.k=3"], "run `python run.py model=topk"),
        (["task.effect_images=11"], "expected a whole number, 0 to 10"),
        (["task.words=nowhere.txt"], "one word a line"),
    ],
)
def test_what_cannot_be_is_one_sentence(trained, overrides, words):
    done = run(trained, *overrides)
    assert done.returncode != 0
    assert words in done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr

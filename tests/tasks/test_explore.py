"""`task=explore` as a user runs it, on an SAE with random weights where a trained one would be."""

import json
import socket
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig
from PIL import Image

from clipsae.clip import FrozenCLIP
from clipsae.errors import ConfigError
from clipsae.sae import SAE
from clipsae.store import Store
from clipsae.tasks import build, evaluate, explore
from clipsae.tasks.stages import pictures, sae
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
    train_set = build.build_dataset(cfg.train_dataset, "train", 64)
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

    written = page.stat().st_ino
    done = run(trained)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"using the finished {folder}" in done.stdout + done.stderr
    assert page.stat().st_ino == written

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
    assert (look["clip"], look["sae"], look["why"]) == ([], [], None)
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


@pytest.mark.slow
def test_a_page_of_an_imported_sae_with_the_names_of_files(tmp_path):
    """As task=evaluate takes it: the SAE whose page it is has other numbers of latents than the
    config's, which is not trained."""
    torch.manual_seed(0)
    SAE(
        d=FrozenCLIP.load("clipsae-tiny", "builtin").width, latents=72, activation="topk", k=4
    ).save(tmp_path / "theirs")
    for kind, colour in (("red", (220, 30, 30)), ("blue", (30, 30, 220))):
        (tmp_path / "photos" / kind).mkdir(parents=True)
        for i in range(3):
            pixels = Image.new("RGB", (70, 64), colour)
            pixels.paste((0, 10 * i, 99), (0, 0, 20, 20 + i))
            pixels.save(tmp_path / "photos" / kind / f"IMG {i}.png")
    images = ["dataset=image_folder", f"dataset.root={tmp_path / 'photos'}"]
    args = [
        f"task.sae={tmp_path / 'theirs'}",
        "task.pages=2",
        "logger=wandb",
        "logger.mode=offline",
    ]
    args += ["logger.upload_sae=true", "measurement.image_encoder=null"]
    out = tmp_path / "out"
    done = run_py("task=explore", f"paths.output_dir={out}", *images, *args)
    assert done.returncode == 0, done.stdout + done.stderr
    (page,) = out.glob("explore/theirs-*/index.html")
    meta = read(page.parent / "data" / "meta.js")
    assert meta["latents"] == 72
    assert "imported" in meta["about"]["SAE"]
    assert meta["about"]["Trained on"] == "elsewhere"
    assert set(meta["names"].values()) <= {
        f"{c}/IMG {i}.png" for c in ("red", "blue") for i in range(3)
    }
    assert {meta["names"][str(look["index"])].split("/")[0] for look in meta["looks"]} == {
        *("red", "blue")
    }
    assert str(tmp_path) not in (page.parent / "data" / "meta.js").read_text()
    (file,) = out.glob("wandb/offline-run-*/*.wandb")
    assert b"sae.safetensors" in file.read_bytes()
    assert len(list(out.glob("sae/*"))) == 1

    drawn = run_py(
        "task=visualize",
        f"paths.output_dir={out}",
        *images,
        *args[:1],
        args[-1],
        "task.filter=none",
    )
    assert drawn.returncode == 0, drawn.stdout + drawn.stderr
    assert "collecting" not in drawn.stdout + drawn.stderr  # the page's serve here, too
    assert list(out.glob("figures/theirs-*/*.png"))


def test_the_images_of_a_folder_without_splits_are_not_called_a_test_split(trained):
    cfg = composed()
    dataset = build.build_dataset(cfg.dataset, "test", 64)
    assert pictures.split_name(dataset, "test") == "test split"
    dataset.one_split = True
    assert pictures.split_name(dataset, "test") == "all images, those of the training too"


def test_why_there_are_few_images_is_said():
    given = composed("evaluation.limit_images=5")
    assert pictures.why_few(given) == "evaluation.limit_images=5"
    assert "random weights" in pictures.why_few(composed("clip.pretrained=null"))


def test_a_threshold_of_imported_saes_is_that_of_evaluate():
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        cfg = compose("config", ["task=evaluate"])
    assert cfg.task.count_threshold == evaluate.COUNT_THRESHOLD


def test_a_taken_port_is_refused_before_anything_begins():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"task.port={port}: .*or 0 for any free one"):
            explore.check(composed("task.serve=true", f"task.port={port}"))
        explore.check(composed(f"task.port={port}"))  # which is not served
    explore.check(composed("task.serve=true", f"task.port={port}"))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"red\nred\n\n", "at least two lines that differ"),
        (b"\xff\xfe\x00r", "not UTF-8 text"),
        (None, "one word a line"),
    ],
)
def test_words_that_cannot_be_are_refused_before_anything_begins(tmp_path, content, words):
    file = tmp_path / "words.txt"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ConfigError, match=words):
        explore.check(composed(f"task.words={file}"))


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

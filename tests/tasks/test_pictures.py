"""`task=explore` and `task=visualize` as a user runs them, on SAEs with random weights."""

import base64
import json
import socket
import subprocess
import zlib
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
from clipsae.tasks import build, evaluate, explore, pictures, visualize
from clipsae.tasks.stages import sae
from run import ROOT
from tests.warm import run_py

SMALL = ["model.latents=96", "dataset.size=24"]
NO_TEXTS = [
    *("clip=dinov2_s_14", "clip.name=timm:vit_tiny_patch16_224", "clip.pretrained=null"),
    *("clip.image_size=64", "evaluation=none", "measurement=none"),
]


def composed(*overrides: str) -> DictConfig:
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return compose("config", [*SMALL, "precision=float32", *overrides])


def make_sae(root: Path, model: str, width: int, overrides: Sequence[str] = ()) -> None:
    torch.manual_seed(0)
    cfg = composed(f"model={model}", *overrides)
    train_set = build.build_dataset(cfg.train_dataset, "train", 64)
    sae.stage(cfg, Store(root), train_set).make(build.build_sae(cfg, width).save)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A store with a TopK and a Sparsemax SAE of `SMALL`, in two precisions."""
    root = tmp_path_factory.mktemp("store")
    for model, precision in (("topk", "float32"), ("sparsemax", "tf32")):
        width = FrozenCLIP.load("clipsae-tiny", "builtin").width
        make_sae(root, model, width, [f"precision={precision}"])
    return root


def run(task: str, folder: Path, *overrides: str) -> subprocess.CompletedProcess:
    done = run_py(f"task={task}", f"paths.output_dir={folder}", *SMALL, *overrides)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def read(file: Path):
    """The content of a data script."""
    text = file.read_text().strip()
    content = json.loads(text[text.index(",") + 1 : -2])
    if isinstance(content, str):
        return json.loads(zlib.decompress(base64.b64decode(content)))
    return content


@pytest.mark.slow
def test_a_page_and_figures_with_the_same_references(trained, tmp_path, monkeypatch):
    done = run("explore", trained, "model=topk", "task.pages=3")
    assert not (trained / "wandb").exists()
    (page,) = trained.glob("explore/*/index.html")
    assert str(page) in done.stdout
    folder = page.parent
    meta, dictionary = (read(folder / "data" / f"{name}.js") for name in ("meta", "0/dictionary"))
    assert dictionary["latents"] == 96
    assert {"red", "ring", "striped", "grass"} <= set(dictionary["naming"]["words"])
    assert [look["index"] for look in meta["looks"]] == [0, 8, 16]
    assert (folder / "thumbs/0/8.jpg").is_file()
    assert {file.name for file in (folder / "images").iterdir()} == {"0.jpg", "8.jpg", "16.jpg"}
    chunk = read(folder / "data/0/latents/0.js")
    assert len(chunk) == 64
    live = next(latent for latent in chunk if latent)
    assert len(live["near"]) == 8
    assert {"helps", "hurts", "words", "maps"} <= set(live)
    assert str(tmp_path.parent) not in (folder / "data" / "meta.js").read_text()

    written = page.stat().st_ino
    done = run("explore", trained, "model=topk", "task.pages=3")
    assert f"using the finished {folder}" in done.stdout + done.stderr
    assert page.stat().st_ino == written

    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path))
    more = ["task.pages=3", "task.effect_images=0", "task.upload=true", "logger.mode=offline"]
    more += ["task.thumbnails=false", "task.names=false", "task.models=[topk,sparsemax]"]
    again = run("explore", trained, *more)
    (both,) = trained.glob("explore/topk+sparsemax-*")
    (file,) = trained.glob("wandb/offline-run-*/*.wandb")
    assert b"explore" in (told := file.read_bytes())
    assert both.name.replace("+", "-").encode() in told
    assert not list(both.glob("**/*.jpg"))
    assert [sae["name"] for sae in read(both / "data/meta.js")["saes"]] == ["topk", "sparsemax"]
    for one, other in ((0, 1), (1, 0)):
        assert read(both / f"data/{one}/dictionary.js")["naming"] is None
        assert 0 < read(both / f"data/{one}/match{other}.js")["chance"] < 1
        latents = read(both / f"data/{one}/latents/0.js")
        assert not {"helps", "words"} & set(next(latent for latent in latents if latent))
    assert not list(trained.glob("explore/.*"))

    photo = tmp_path / "a photo.png"
    Image.new("RGB", (90, 70), "red").save(photo)
    assert "collecting" in again.stdout  # of the second SAE alone
    options = ["task.models=[topk,sparsemax]", f'task.images=["{photo}"]', "task.indices=[5]"]
    done = run("visualize", trained, *options, "task.filter=none", "task.references=2")
    figures = sorted(trained.glob("figures/topk+sparsemax-*/*"))
    assert [path.suffix for path in figures] == [".pdf", ".png"] * 2
    assert any("test-00005" in path.name for path in figures)
    assert any("a photo" in path.name for path in figures)
    assert all(str(path) in done.stdout for path in figures if path.suffix == ".png")
    assert len(list(trained.glob("pictures/*/pictures.safetensors"))) == 2


@pytest.mark.slow
def test_a_backbone_without_texts_has_a_page_without_predictions(tmp_path):
    make_sae(tmp_path, "topk", 192, NO_TEXTS)
    run("explore", tmp_path, "model=topk", "task.pages=3", *NO_TEXTS)
    (page,) = tmp_path.glob("explore/*/index.html")
    meta = read(page.parent / "data" / "meta.js")
    assert read(page.parent / "data/0/dictionary.js")["naming"] is None
    assert {look["said"] for look in meta["looks"]} == {None}
    look = read(page.parent / "data/0/looks/8.js")
    assert look["tokens"]
    assert (look["clip"], look["sae"], look["why"]) == ([], [], None)
    live = next(latent for latent in read(page.parent / "data/0/latents/0.js") if latent)
    assert len(live["near"]) == 8
    assert not {"helps", "hurts"} & set(live)


@pytest.mark.slow
def test_an_imported_sae_on_a_folder_of_images(tmp_path):
    """As task=evaluate takes it: with another number of latents than the config's, which is not
    trained. Images are named by their files."""
    torch.manual_seed(0)
    width = FrozenCLIP.load("clipsae-tiny", "builtin").width
    SAE(d=width, latents=72, activation="topk", k=4).save(tmp_path / "theirs")
    for kind, colour in (("red", (220, 30, 30)), ("blue", (30, 30, 220))):
        (tmp_path / "photos" / kind).mkdir(parents=True)
        for i in range(3):
            pixels = Image.new("RGB", (70, 64), colour)
            pixels.paste((0, 10 * i, 99), (0, 0, 20, 20 + i))
            pixels.save(tmp_path / "photos" / kind / f"IMG {i}.png")
    out = tmp_path / "out"
    shared = ["dataset=image_folder", f"dataset.root={tmp_path / 'photos'}"]
    shared += [f"task.sae={tmp_path / 'theirs'}", "measurement.image_encoder=null"]
    logged = ["logger=wandb", "logger.mode=offline", "logger.upload_sae=true"]
    done = run_py("task=explore", f"paths.output_dir={out}", *shared, *logged, "task.pages=2")
    assert done.returncode == 0, done.stdout + done.stderr
    (page,) = out.glob("explore/theirs-*/index.html")
    meta = read(page.parent / "data" / "meta.js")
    assert read(page.parent / "data/0/dictionary.js")["latents"] == 72
    (own,) = meta["saes"]
    assert "imported" in own["about"]["SAE"]
    assert own["about"]["Trained on"] == "elsewhere"
    files = {f"{kind}/IMG {i}.png" for kind in ("red", "blue") for i in range(3)}
    assert set(meta["names"].values()) <= files
    shown = [meta["names"][str(look["index"])] for look in meta["looks"]]
    assert {name.split("/")[0] for name in shown} == {"red", "blue"}
    assert str(tmp_path) not in (page.parent / "data" / "meta.js").read_text()
    (file,) = out.glob("wandb/offline-run-*/*.wandb")
    assert b"sae.safetensors" in file.read_bytes()
    assert len(list(out.glob("sae/*"))) == 1

    options = ["task.filter=none", "task.indices=[0]", "task.references=1"]
    drawn = run_py("task=visualize", f"paths.output_dir={out}", *shared, *options)
    assert drawn.returncode == 0, drawn.stdout + drawn.stderr
    assert "collecting" not in drawn.stdout + drawn.stderr  # the references of the page are used
    assert list(out.glob("figures/theirs-*/*.png"))


@pytest.mark.filterwarnings("ignore:.*RANDOM WEIGHTS")
def test_a_page_that_is_served_needs_texts():
    cfg = composed("task=explore", *NO_TEXTS, "task.serve=true")
    clip = build.build_clip(cfg)
    with pytest.raises(ConfigError, match="has no text tower"):
        explore.check_text(cfg, clip, build.build_dataset(cfg.dataset, "test", 64))


def test_how_images_are_called():
    cfg = composed("task=explore", "evaluation.limit_images=5")
    dataset = build.build_dataset(cfg.dataset, "test", 64)
    assert pictures.split_name(dataset, "test") == "test split"
    dataset.one_split = True
    assert pictures.split_name(dataset, "test") == "all images, those of the training too"
    assert pictures.why_few(cfg) == "evaluation.limit_images=5"
    assert "random weights" in pictures.why_few(composed("clip.pretrained=null"))


def test_a_threshold_of_imported_saes_is_that_of_evaluate():
    assert composed("task=evaluate").task.count_threshold == evaluate.COUNT_THRESHOLD


def test_a_taken_port_is_refused_before_anything_begins():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"task.port={port}: .*or 0 for any free one"):
            explore.check(composed("task=explore", "task.serve=true", f"task.port={port}"))
        explore.check(composed("task=explore", f"task.port={port}"))  # which is not served
    explore.check(composed("task=explore", "task.serve=true", f"task.port={port}"))


@pytest.mark.parametrize(
    ("task", "overrides", "words"),
    [
        (explore, ["task=explore", "task.upload=true", "logger=csv"], "choose logger=wandb"),
        (visualize, ["task.images=[nowhere.jpg]"], "nowhere.jpg: no such file"),
        (visualize, ["task.sae=nowhere", "task.models=[topk]"], "expected one of them"),
        (explore, ["task=explore", "task.sae=x", "task.models=[topk]"], "expected one of them"),
        (visualize, ["logger.upload_sae=true"], "task=visualize uploads nothing"),
        (visualize, ["clip.hook=embedding"], "the image embedding has none; task=explore"),
        (
            visualize,
            ["clip.hook=towers"],
            "clip.hook=towers: task=visualize draws on which patches",
        ),
    ],
)
def test_invalid_options_are_refused(task, overrides, words):
    explore.check(composed("task=explore", "task.upload=true"))
    with pytest.raises(ConfigError, match=words):
        task.check(composed("task=visualize", *overrides))


def test_an_index_beyond_the_dataset_is_refused():
    cfg = composed("task=visualize", "task.indices=[24]")
    with pytest.raises(ConfigError, match="expected 0 to 23"):
        visualize.wanted_images(cfg, build.build_dataset(cfg.dataset, "test", 64), 64)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["task=explore", "model=topk", "model.k=3"], "run `python run.py model=topk"),
        (["task=visualize", "task.models=[topkk]"], "topkk"),
    ],
)
def test_an_sae_that_is_not_there_is_one_sentence(trained, overrides, words):
    done = run_py(f"paths.output_dir={trained}", *SMALL, *overrides)
    assert done.returncode != 0
    assert words in done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr

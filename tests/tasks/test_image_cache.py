"""Decoded images on disk: the batches of online training bit for bit, one cache for every layer and
SAE, whole after a kill."""

import logging
import os
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hydra import compose, initialize_config_dir
from PIL import Image
from safetensors.torch import load_file

from clipsae.clip import FrozenCLIP
from clipsae.data import FeatureDataModule, ImageList
from clipsae.data.cache import Cache, CacheLoader, ImageLayout
from clipsae.data.loader import ResumableLoader, image_batches
from clipsae.data.scenes import ScenesDataset
from clipsae.errors import ConfigError
from clipsae.store import Store
from clipsae.store.files import sha256
from clipsae.tasks.experiment import Experiment
from clipsae.tasks.stages import features, sae
from run import ROOT
from tests.warm import run_py

N, SHARD = 150, 64


def config(folder: Path, *overrides: str):
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return compose(
            "config",
            [
                *("task=cache", "features=images", "features.num_workers=0", "precision=float32"),
                *(f"paths.output_dir={folder}", f"+train_dataset.size={N}"),
                f"features.image_cache.shard_gb={(SHARD + 0.5) * 3 * 64 * 64 / 1e9}",
                *overrides,
            ],
        )


@pytest.fixture(scope="module")
def clip():
    return FrozenCLIP.load("clipsae-tiny", "builtin")


@pytest.fixture(scope="module")
def scenes():
    return ScenesDataset(kind="all", split="train", size=N)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A list of image files of which two cannot be read, one of them the last."""
    folder = tmp_path_factory.mktemp("files")
    names = [f"{i}.png" for i in range(N)]
    noise = torch.randint(256, (N, 9, 8, 3), generator=torch.Generator().manual_seed(0))
    for name, pixels in zip(names, noise.to(torch.uint8).numpy(), strict=True):
        Image.fromarray(pixels).save(folder / name)
    for i in (70, N - 1):
        (folder / names[i]).write_bytes(b"damaged")
    return ImageList(folder, names, [0] * N, ["one"], image_size=64, on_bad_image="skip")


@pytest.fixture(scope="module", params=["scenes", "files"])
def both(request, tmp_path_factory, clip):
    """A dataset and its cache."""
    images = request.getfixturevalue(request.param)
    cfg = config(tmp_path_factory.mktemp("both"))
    return images, features.open_cache(cfg, clip, images)


def checksums(folder: Path) -> dict[str, str]:
    return {path.name: sha256(path) for path in folder.glob("pixels-*")}


def test_the_files_hold_the_pixels_in_the_datasets_order(both):
    images, cache = both
    shards = [load_file(cache.folder / f"pixels-0000{i}.safetensors") for i in range(3)]
    assert [len(shard["pixels"]) for shard in shards] == [64, 64, 22]
    whole = {name: torch.cat([shard[name] for shard in shards]) for name in shards[0]}
    assert torch.equal(whole["images"], torch.arange(N))
    expected = image_batches(images, N)
    pixels, _, readable = next(iter(expected))
    assert torch.equal(whole["pixels"][readable], pixels)
    replaced = (whole["images"] != whole["sources"]).nonzero().flatten().tolist()
    assert replaced == ([] if isinstance(images, ScenesDataset) else [70, N - 1])
    assert whole["sources"][replaced].tolist() == [71, 0][: len(replaced)]


@pytest.mark.parametrize("options", [{}, {"shuffle_images": 24}, {"world_size": 2, "rank": 1}])
def test_the_batches_are_those_of_online_training_and_either_goes_on_where_the_other_was(
    both, options
):
    """Two epochs, in the midst of which a loader of the other kind takes over, and once more."""
    images, cache = both
    online, cached = (
        lambda: ResumableLoader(images, 8, seed=3, **options),
        lambda: CacheLoader(cache, 8, seed=3, buffer_images=40, **options),
    )
    expected = [batch for loader in [online()] for _ in range(2) for batch in loader]
    found: list[torch.Tensor] = []
    state = None
    for make, until in ((cached, 5), (online, 7), (cached, len(expected))):
        loader = make()
        if state is not None:
            loader.load_state_dict(state)
        while len(found) < until:
            for batch in loader:
                found.append(batch)
                if len(found) == until:
                    break
        state = loader.state_dict()
        loader.close()
    assert len(found) == len(expected) > 16
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("shuffle", [0, 16])
def test_the_tokens_are_those_of_online_training(both, clip, shuffle):
    images, cache = both
    options = {"batch_size": 8, "shuffle_buffer_images": shuffle, "seed": 1}
    online = FeatureDataModule(clip, images, **options)
    cached = FeatureDataModule(clip, images, cache=cache, **options)
    assert torch.equal(online.first_batch(20), cached.first_batch(20))
    pairs = list(zip(online._loader(), cached._loader(), strict=True))
    assert len(pairs) == N // 8
    assert all(torch.equal(one, other) for one, other in pairs)


def test_one_cache_for_every_layer_clip_and_sae(tmp_path, scenes):
    def place(*overrides: str) -> Path:
        return features.stage(config(tmp_path, *overrides), scenes).path

    same = place()
    assert same.parent == tmp_path / "images"
    for override in ("clip.layer=-1", "precision=bf16", "clip=vit_b_16", "model=relu"):
        assert place(override) == same
    for override in ("features.shuffle_buffer_images=64", "features.batch_size=16", "seed=1"):
        assert place(override) == same
    assert place("+train_dataset.seed=1") != same
    larger = ScenesDataset(kind="all", split="train", size=N, image_size=96)
    assert features.stage(config(tmp_path), larger).path != same


def test_the_sae_is_found_that_was_trained_online(tmp_path, scenes):
    def path(*overrides: str) -> str:
        with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
            cfg = compose("config", [f"+train_dataset.size={N}", "precision=float32", *overrides])
        return sae.stage(cfg, Store(tmp_path), scenes).path.name

    assert path("features=images") == path("features=online") != path("features=cached")


def test_files_whose_images_are_in_the_cache_are_not_looked_at_for_damage(tmp_path, clip, scenes):
    def looked_at(choice: str) -> list[object]:
        with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
            sizes = [f"paths.output_dir={tmp_path}", f"+train_dataset.size={N}"]
            cfg = compose("config", [f"features={choice}", "precision=float32", *sizes])
        sets = {"train_set": scenes, "test_set": "tested", "held_out": lambda: "held out"}
        return list(Experiment._read(SimpleNamespace(cfg=cfg, **sets)))

    assert looked_at("images") == [scenes, "held out", "tested"]
    features.make(config(tmp_path), clip, scenes)
    assert looked_at("images") == ["held out", "tested"]
    assert looked_at("cached") == looked_at("online") == [scenes, "held out", "tested"]


class Deadly:
    """A dataset that notes the images that it decodes, and kills the process at one of them."""

    def __init__(self, images: ScenesDataset, notes: Path, kill_at: int | None = None) -> None:
        self._images, self._notes, self._kill_at = images, notes, kill_at

    def __getattr__(self, name: str):
        if name == "__getitems__":
            raise AttributeError(name)
        return getattr(self._images, name)

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int):
        if index == self._kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        with self._notes.open("a") as notes:
            notes.write(f"{index}\n")
        return self._images[index]

    def decoded(self) -> list[int]:
        return list(map(int, self._notes.read_text().split()))


def test_a_killed_job_loses_the_shard_it_was_at(tmp_path, clip, scenes):
    whole = features.make(config(tmp_path / "whole"), clip, scenes)
    cfg = config(tmp_path / "out")
    if (pid := os.fork()) == 0:
        features.make(cfg, clip, Deadly(scenes, tmp_path / "notes", 140))
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    assert not list((tmp_path / "out").glob("images/*"))
    assert len(list((tmp_path / "out" / "shards").glob("[!.]*"))) == 2
    again = Deadly(scenes, tmp_path / "again")
    folder = features.make(cfg, clip, again)
    assert again.decoded() == list(range(128, N))
    assert checksums(folder) == checksums(whole)
    (folder / "pixels-00001.safetensors").write_bytes(b"half")
    assert checksums(features.make(cfg, clip, again)) == checksums(whole)
    assert again.decoded()[N - 128 :] == list(range(64, 128))


def test_a_disk_that_is_too_small_is_refused_before_an_image_is_read(tmp_path, monkeypatch, caplog):
    class ImageNet:
        fingerprint, image_size = "0123456789abcdef", 224

        def __len__(self):
            return 1_281_167

    clip = SimpleNamespace(tokens=197, width=768)
    cfg = config(tmp_path / "out", "clip=vit_b_16", "features.image_cache.shard_gb=4")
    monkeypatch.setattr(features, "free_bytes", lambda _: 100_000_000_000)
    with pytest.raises(ConfigError, match=r"need 192\.9 GB, and .*/out has 100\.0 GB free") as said:
        features.check(cfg, clip, ImageNet())
    assert "features.image_cache.folder" in str(said.value)
    monkeypatch.setattr(features, "free_bytes", lambda _: 200_000_000_000)
    caplog.set_level(logging.INFO, "clipsae")
    features.check(cfg, clip, ImageNet())
    assert "192.87 GB to write in 49 of 49 shards" in caplog.text


def test_a_cache_of_tokens_is_not_taken_for_one_of_images(both):
    _, cache = both
    with pytest.raises(ValueError, match=r"clipsae image cache.*expected 'clipsae feature cache'"):
        Cache(cache.folder)
    with pytest.raises(ValueError, match=r"image_size=0: must be at least 1"):
        ImageLayout(images=1, image_size=0)


@pytest.mark.slow
def test_a_training_from_it_ends_with_the_same_bytes(tmp_path):
    def train(where: str, *overrides: str) -> Path:
        folder = tmp_path / where
        done = run_py(
            f"paths.output_dir={folder}",
            *("model=topk", "model.latents=64", "trainer.max_steps=12", "features.batch_size=8"),
            *("+train_dataset.size=90", "dataset.size=20", "trainer.val_check_interval=6"),
            *("trainer.limit_val_batches=1", "evaluation=none", "measurement=none"),
            *("logger=none", *overrides),
        )
        assert done.returncode == 0, done.stderr
        (made,) = folder.glob("sae/*")
        return made

    online, cached = train("online", "features=online"), train("images", "features=images")
    assert online.name == cached.name
    weights = [(folder / "sae.safetensors").read_bytes() for folder in (online, cached)]
    assert weights[0] == weights[1]
    assert len(list((tmp_path / "images" / "images").iterdir())) == 1

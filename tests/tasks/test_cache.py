"""The feature cache as a stage: made once, continued after a kill, by several at once, mended shard
by shard, refused where it does not fit; and trained from."""

import json
import logging
import os
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hydra import compose, initialize_config_dir
from safetensors.torch import load_file

from clipsae.clip import FrozenCLIP
from clipsae.data.scenes import ScenesDataset
from clipsae.errors import ConfigError
from clipsae.store import Store
from clipsae.store.files import sha256
from clipsae.tasks import cache as task
from clipsae.tasks.stages import features, sae
from clipsae.tasks.tracking import public_config
from run import ROOT
from tests.warm import run_py

N, SHARD = 300, 128  # shards of two batches, two, and one


@pytest.fixture(scope="module")
def clip():
    return FrozenCLIP.load("clipsae-tiny", "builtin")


@pytest.fixture(scope="module")
def scenes():
    return ScenesDataset(kind="all", split="train", size=N)


def config(folder: Path, *overrides: str):
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return compose(
            "config",
            [
                "task=cache",
                "precision=float32",
                f"paths.output_dir={folder}",
                f"+train_dataset.size={N}",
                f"features.cache.shard_gb={(SHARD + 0.5) * 65 * 128 * 2 / 1e9}",
                *overrides,
            ],
        )


def checksums(folder: Path) -> dict[str, str]:
    return {path.name: sha256(path) for path in folder.glob("tokens-*")}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, clip, scenes) -> dict[str, str]:
    return checksums(features.make(config(tmp_path_factory.mktemp("u")), clip, scenes))


class Watched:
    """A CLIP that notes each batch in a file, and kills its process before the last of them."""

    def __init__(self, clip: FrozenCLIP, notes: Path, kill_at: int | None = None) -> None:
        self._clip, self._notes, self._kill_at = clip, notes, kill_at
        self._batches = 0

    def __getattr__(self, name: str):
        return getattr(self._clip, name)

    def prefix(self, images):
        self._batches += 1
        if self._batches == self._kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        with self._notes.open("a") as notes:
            notes.write("batch\n")
        return self._clip.prefix(images)

    def batches(self) -> int:
        return len(self._notes.read_text().splitlines())


def in_child(work) -> int:
    """Run `work` in a process of its own; its number."""
    if (pid := os.fork()) == 0:
        try:
            work()
            os._exit(0)
        except BaseException:
            logging.exception("in the child")
            os._exit(1)
    return pid


def test_made_once_and_found_again(tmp_path, clip, scenes, undisturbed):
    watched = Watched(clip, tmp_path / "notes")
    cfg = config(tmp_path / "out")
    folder = features.make(cfg, watched, scenes)
    assert folder.parent == tmp_path / "out" / "features"
    assert checksums(folder) == undisturbed
    assert len(undisturbed) == 3
    manifest = json.loads((folder / "manifest.json").read_text())
    assert {s["file"]: s["sha256"] for s in manifest["shards"]} == undisturbed
    assert list((tmp_path / "out" / "shards").iterdir()) == []
    assert features.make(cfg, watched, scenes) == folder
    assert features.make(cfg, watched, scenes, content=True) == folder
    assert watched.batches() == 5
    # Where it lies, how large shards are and who reads do not make another cache.
    same = config(tmp_path / "out", "features.num_workers=3", "features.cache.shard_gb=1", "seed=5")
    assert features.stage(same, scenes).path == folder
    for other in ("features.cache.dtype=fp32", "features.cache.order_seed=1", "clip.layer=-1"):
        assert features.stage(config(tmp_path / "out", other), scenes).path != folder


@pytest.mark.parametrize("kill_at", [1, 4, 5])
def test_killed_while_writing_and_continued(tmp_path, clip, scenes, undisturbed, kill_at):
    """In the first batch; in the midst of the second shard; in the third."""
    cfg = config(tmp_path / "out")
    watched = Watched(clip, tmp_path / "notes", kill_at)
    pid = in_child(lambda: features.make(cfg, watched, scenes))
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    assert not list((tmp_path / "out").glob("features/*"))
    again = Watched(clip, tmp_path / "again")
    assert checksums(features.make(cfg, again, scenes)) == undisturbed
    assert again.batches() == {1: 5, 4: 3, 5: 1}[kill_at]  # whole shards are kept


def test_killed_while_it_is_put_together(tmp_path, clip, scenes, undisturbed, monkeypatch):
    cfg = config(tmp_path / "out")

    def die(*_):
        os.kill(os.getpid(), signal.SIGKILL)

    def work():
        monkeypatch.setattr(features, "write_manifest", die)
        features.make(cfg, clip, scenes)

    pid = in_child(work)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    again = Watched(clip, tmp_path / "again")
    assert checksums(features.make(cfg, again, scenes)) == undisturbed
    assert not again._notes.exists()


def test_several_jobs_share_the_shards(tmp_path, clip, scenes, undisturbed):
    cfg = config(tmp_path / "out")
    notes = [tmp_path / "a", tmp_path / "b"]
    pids = [
        in_child(lambda note=note: features.make(cfg, Watched(clip, note), scenes))
        for note in notes
    ]
    assert [os.waitpid(pid, 0)[1] for pid in pids] == [0, 0]
    (folder,) = (tmp_path / "out" / "features").glob("[!.]*")
    assert checksums(folder) == undisturbed
    assert sum(Watched(clip, note).batches() for note in notes if note.exists()) == 5


@pytest.mark.parametrize("spoilt", ["cut", "gone", "flipped", "manifest"])
def test_what_is_damaged_is_made_anew_and_the_rest_is_kept(
    tmp_path, clip, scenes, undisturbed, spoilt
):
    cfg = config(tmp_path / "out")
    folder = features.make(cfg, clip, scenes)
    victim = folder / "tokens-00001.safetensors"
    if spoilt == "cut":
        os.truncate(victim, 5000)
    elif spoilt == "gone":
        victim.unlink()
    elif spoilt == "manifest":
        (folder / "manifest.json").write_text("{}")
    else:
        with victim.open("r+b") as file:
            file.seek(70_000)
            byte = file.read(1)[0]
            file.seek(70_000)
            file.write(bytes([byte ^ 1]))
    again = Watched(clip, tmp_path / "again")
    assert features.make(cfg, again, scenes, content=spoilt == "flipped") == folder
    assert checksums(folder) == undisturbed
    assert (again.batches() if again._notes.exists() else 0) == {"manifest": 0}.get(spoilt, 2)
    assert len(list(folder.parent.glob(".*.damaged-1"))) == 1


def test_a_flipped_byte_is_seen_on_request(tmp_path, clip, scenes, undisturbed, monkeypatch):
    cfg = config(tmp_path / "out")
    monkeypatch.setattr(task.build, "build_clip", lambda _: clip)
    task.run(cfg)
    (folder,) = (tmp_path / "out" / "features").glob("[!.]*")
    victim = folder / "tokens-00002.safetensors"
    content = bytearray(victim.read_bytes())
    content[9000] ^= 64
    victim.write_bytes(content)
    task.run(cfg)  # sizes alone
    assert checksums(folder) != undisturbed
    cfg.task.verify = True
    task.run(cfg)
    assert checksums(folder) == undisturbed


def test_a_disk_that_is_too_small_is_refused(tmp_path, monkeypatch, caplog):
    """ImageNet's train split, before any image is read."""
    free = 387_000_000_000
    monkeypatch.setattr(features, "free_bytes", lambda _: free)
    clip = SimpleNamespace(positions=197, width=768)

    class ImageNet:
        fingerprint, image_size = "0123456789abcdef", 224

        def __len__(self):
            return 1_281_167

    cfg = config(
        tmp_path / "out", "train_dataset=imagenet", "clip=vit_b_16", "++train_dataset.size=1"
    )
    cfg.features.cache.shard_gb = 4
    words = r"need 387\.7 GB, and .*/out has 387\.0 GB free"
    with pytest.raises(ConfigError, match=words) as said:
        features.check(cfg, clip, ImageNet())
    assert "features=online" in str(said.value)
    assert "\n" not in str(said.value)
    free = 390_000_000_000
    caplog.set_level(logging.INFO, "clipsae")
    features.check(cfg, clip, ImageNet())
    assert "387.69 GB to write in 98 of 98 shards" in caplog.text
    assert "390.0 GB free" in caplog.text
    assert not (tmp_path / "out").exists()


def test_the_disk_needs_to_hold_only_what_is_missing(tmp_path, clip, scenes, caplog):
    cfg = config(tmp_path / "out")
    pid = in_child(lambda: features.make(cfg, Watched(clip, tmp_path / "notes", 5), scenes))
    os.waitpid(pid, 0)
    caplog.set_level(logging.INFO, "clipsae")
    features.check(cfg, clip, scenes)
    assert "in 1 of 3 shards" in caplog.text
    features.make(cfg, clip, scenes)
    caplog.clear()
    features.check(cfg, clip, scenes)
    assert "using the feature cache" in caplog.text


def test_another_cache_in_its_place_is_refused(tmp_path, clip, scenes, monkeypatch):
    """A folder that was renamed."""
    folder = features.make(config(tmp_path / "out"), clip, scenes)
    cfg = config(tmp_path / "out", "clip.layer=-1")
    folder.rename(features.stage(cfg, scenes).path)
    with pytest.raises(ConfigError, match=r"tokens of clip=.*'layer': -2.*expected .*'layer': -1"):
        features.open_cache(cfg, clip, scenes)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("features.cache.dtype=int8", "dtype='int8': expected one of bf16, fp16, fp32"),
        ("features.cache.shard_gb=0", "shard_gb=0"),
        ("features.block_images=0", "block_images=0"),
        ("features.buffer_images=-1", "buffer_images=-1"),
        ("features.batch_size=0", "batch_size=0"),
        ("features.shuffle_buffer_images=33", "shuffle_buffer_images=33"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_begins(tmp_path, clip, scenes, override, words):
    cfg = config(tmp_path / "out", override)
    with pytest.raises(ConfigError, match=words):
        sae.check(cfg, clip, scenes)
    assert not (tmp_path / "out").exists()


def test_the_saes_key_holds_what_changes_it(tmp_path, scenes):
    def path(*overrides: str) -> str:
        cfg = config(tmp_path, *overrides)
        return sae.stage(cfg, Store(tmp_path), scenes).path.name

    cached = path()
    for same in (
        "features.cache.folder=/elsewhere",
        "features.cache.shard_gb=1",
        "features.num_workers=7",
    ):
        assert path(same) == cached
    for other in (
        "features.cache.dtype=fp32",
        "features.cache.order_seed=1",
        "features.block_images=1",
        "features.buffer_images=0",
        "features.shuffle_buffer_images=32",
    ):
        assert path(other) != cached


def test_no_path_of_this_machine_is_logged(tmp_path):
    public = public_config(
        config(
            *(tmp_path, "dataset=image_folder", f"dataset.root={tmp_path}/photos"),
            *(f"clip.pretrained={tmp_path}/weights.pt", f"plugins=[{tmp_path}/mine.py,'~/own.py']"),
        )
    )
    assert public["features"]["cache"]["dtype"] == "bf16"
    assert public["clip"]["pretrained"] == "weights.pt"
    assert public["plugins"] == ["mine.py", "own.py"]
    assert str(tmp_path) not in json.dumps(public)


def train(folder: Path, *overrides: str) -> Path:
    done = run_py(
        f"paths.output_dir={folder}",
        *("model=topk", "model.latents=64", "trainer.max_steps=12", "features.batch_size=8"),
        *("+train_dataset.size=90", "dataset.size=20", "trainer.val_check_interval=6"),
        *("trainer.limit_val_batches=1", "evaluation.settings=[no_sae,on]", "measurement=none"),
        *("logger=none", *overrides),
    )
    assert done.returncode == 0, done.stderr
    (made,) = folder.glob("sae/*")
    return made


@pytest.mark.slow
def test_the_same_order_gives_the_weights_of_online_training(tmp_path):
    """Twelve steps, into the second epoch. Bit for bit where a token does not depend on its batch,
    as on most CPUs."""
    online = train(tmp_path / "online")
    cached = train(
        tmp_path / "cached",
        "features=cached",
        "features.cache.dtype=fp32",
        "features.block_images=1",
        "features.buffer_images=0",
    )
    assert online.name != cached.name  # different keys
    weights = [load_file(folder / "sae.safetensors") for folder in (online, cached)]
    if _tokens_are_their_own():
        assert (online / "sae.safetensors").read_bytes() == (
            cached / "sae.safetensors"
        ).read_bytes()
    for name, values in weights[0].items():
        torch.testing.assert_close(weights[1][name], values, rtol=1e-3, atol=1e-4)


def _tokens_are_their_own() -> bool:
    clip = FrozenCLIP.load("clipsae-tiny", "builtin")
    images = torch.stack(
        [ScenesDataset(kind="all", split="train", size=64)[i][0] for i in range(64)]
    )
    images = clip.normalize(images)
    order = torch.randperm(64)
    by_eight = torch.cat([clip.prefix(some) for some in images[order].split(8)])
    return torch.equal(by_eight, clip.prefix(images)[order])

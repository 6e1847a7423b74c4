"""What lies on disk: the prefix's tokens, readable by anyone, refused when it is something else."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from clipsae.clip import FrozenCLIP
from clipsae.data.cache import Cache, TokenLayout
from clipsae.data.images import BadImageError
from clipsae.data.scenes import ScenesDataset
from clipsae.store.files import sha256
from tests.data.counting import Numbers


@pytest.fixture(scope="module")
def clip():
    return FrozenCLIP.load("clipsae-tiny", "builtin")


@pytest.fixture(scope="module")
def expected(clip):
    """150 scenes, and the tokens of one image at a time."""
    scenes = ScenesDataset(kind="all", split="train", size=150)
    with torch.inference_mode():
        return scenes, [clip.prefix(clip.normalize(scenes[i][0][None]))[0] for i in range(150)]


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [("fp32", 1e-5), ("fp16", 2.0**-11), ("bf16", 2.0**-8)]
)
def test_the_cache_holds_the_prefixs_tokens(clip, expected, cache, dtype, tolerance):
    """Also as safetensors reads it."""
    scenes, tokens = expected
    sizes = {"tokens": clip.tokens, "width": clip.width, "dtype": dtype, "shard_images": 64}
    written = cache(150, clip=clip, dataset=scenes, **sizes)
    found = written.read(torch.arange(150)).float()
    for position, image in enumerate(written.images.tolist()):
        torch.testing.assert_close(
            found[position], tokens[image], rtol=tolerance, atol=max(tolerance / 64, 1e-5)
        )
    by_others = [load_file(written.folder / f"tokens-0000{s}.safetensors") for s in range(3)]
    assert [len(shard["images"]) for shard in by_others] == [64, 64, 22]
    assert torch.equal(torch.cat([s["tokens"] for s in by_others]).float(), found)
    assert torch.equal(torch.cat([s["images"] for s in by_others]), written.images)


@pytest.mark.parametrize(
    ("dtype", "digest"),
    [("fp32", "482cd99a6afaa37f"), ("bf16", "15148476d0270acf")],
)
def test_files_are_the_same_byte_for_byte_as_ever(cache, dtype, digest):
    folder = cache(100, dtype=dtype).folder
    assert sha256(folder / "tokens-00000.safetensors")[:16] == digest


def test_any_positions_are_read_in_the_order_asked_for(cache):
    found = cache(250, shard_images=64)
    positions = torch.randperm(250)[:90].repeat(2)  # across shards, and twice
    tokens = found.read(positions)
    assert torch.equal(tokens[:, 0, 0].long(), found.images[positions] * 4)
    assert found.read(positions[:0]).shape == (0, 4, 1)


def test_the_order_is_random_and_a_matter_of_the_seed(cache):
    first = cache(500).images
    assert torch.equal(first, cache(500, shard_images=64).images)
    assert not torch.equal(first, cache(500, order_seed=1).images)
    at = torch.arange(500.0)
    assert abs(torch.corrcoef(torch.stack([at, first.float()]))[0, 1]) < 0.2  # 4.5 sigma
    neighbours = (first[1:] - first[:-1]).abs() == 1
    assert neighbours.sum() < 12  # 2 expected


def test_sizes_are_known_before_anything_is_written(cache):
    layout = TokenLayout(images=250, tokens=4, width=1, dtype="fp32", shard_images=64)
    folder = cache(250, shard_images=64).folder
    for shard in range(layout.shards):
        path = folder / layout.file(shard)
        assert path.stat().st_size == layout.bytes(shard)
        with safe_open(path, "pt") as file:
            assert file.get_slice("tokens").get_shape() == [layout.count(shard), 4, 1]
    imagenet = TokenLayout.of_shards(4, images=1_281_167, tokens=197, width=768, dtype="bf16")
    assert sum(map(imagenet.bytes, range(imagenet.shards))) / 1e9 == pytest.approx(388, abs=0.5)
    assert imagenet.bytes(0) / 1e9 == pytest.approx(4, rel=0.01)
    assert imagenet.shard_images % 64 == 0


def test_an_image_that_cannot_be_read(cache, caplog):
    class Partly(Numbers):
        on_bad_image = "skip"

        def __getitem__(self, index):
            if index in (7, 8):
                raise BadImageError(f"{index}.png: no such file")
            return super().__getitem__(index)

    found = cache(200, dataset=Partly(200))
    assert "2 images could not be read and were replaced by the next" in caplog.text
    assert sorted(found.images.tolist()) == list(range(200))
    replaced = found.images != found.sources
    assert sorted(found.images[replaced].tolist()) == [7, 8]
    assert set(found.sources[replaced].tolist()) == {9}
    assert torch.equal(found.read(torch.arange(200))[:, 0, 0].long(), found.sources * 4)
    Partly.on_bad_image = "error"
    with pytest.raises(BadImageError, match=r"[78]\.png.*on_bad_image=skip"):
        cache(200, dataset=Partly(200))


def test_fp16_refuses_what_it_cannot_hold(cache):
    with pytest.raises(ValueError, match=r"dtype=fp16.*use bf16 or fp32"):
        cache(20_000, dtype="fp16", shard_images=20_000)


def edit(folder, **changes):
    path = folder / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda f: edit(f, version=2), r"version 2: expected .* version 1"),
        (lambda f: edit(f, format="else"), "'else'"),
        (lambda f: edit(f, of={"clip": "other"}), "tokens of clip=other, expected counting"),
        (lambda f: edit(f, dtype="bf16"), "another header than the manifest says"),
        (lambda f: edit(f, dtype="int8"), "dtype='int8'"),
        (lambda f: edit(f, images=200), "not 200 images"),
        (lambda f: edit(f, shards=[]), "not 150 images"),
        (lambda f: edit(f, shards=3), "manifest"),
        (lambda f: (f / "manifest.json").write_text("{"), "does not describe the feature cache"),
        (lambda f: (f / "manifest.json").unlink(), "has no manifest.json"),
        (lambda f: (f / "tokens-00001.safetensors").unlink(), "is missing"),
        (lambda f: (f / "tokens-00001.safetensors").write_bytes(b"short"), "has 5 of"),
        (
            lambda f: (f / "tokens-00000.safetensors").write_bytes(
                bytes((f / "tokens-00000.safetensors").stat().st_size)
            ),
            "another header",
        ),
    ],
)
def test_another_cache_is_refused_in_a_sentence(cache, spoil, words):
    folder = cache(150).folder
    Cache(folder, {"clip": "counting"})
    spoil(folder)
    with pytest.raises(ValueError, match=words) as refused:
        Cache(folder, {"clip": "counting"})
    assert str(folder) in str(refused.value) or "dtype" in words
    assert "\n" not in str(refused.value)


def repeat_an_image(path):
    content = bytearray(path.read_bytes())
    content[-1600:-1592] = content[-1592:-1584]  # the first of `images` becomes the second
    path.write_bytes(content)


def test_damage_that_sizes_do_not_show(cache):
    found = cache(100)
    path = found.folder / "tokens-00000.safetensors"
    repeat_an_image(path)
    with pytest.raises(ValueError, match="each of 100 images once"):
        Cache(found.folder)
    with path.open("r+b") as file:  # cut while it is open
        file.truncate(1000)
    with pytest.raises(ValueError, match="ends within its images"):
        found.read(torch.arange(100))


@pytest.mark.parametrize("options", [{"dtype": "int8"}, {"images": 0}, {"shard_images": 0}])
def test_a_layout_that_cannot_be_is_refused(options):
    with pytest.raises(ValueError, match=r"expected|must be at least"):
        TokenLayout(**{"images": 1, "tokens": 1, "width": 1, **options})
    with pytest.raises(ValueError, match="shard_gb=0"):
        TokenLayout.of_shards(0, images=1, tokens=1, width=1)

"""Captions: read from a file, and beside their images in every stream of an SAE of both towers."""

import pytest
import torch
from torch import nn

from clipsae.clip import FrozenCLIP
from clipsae.data import FeatureDataModule, ImageFolder
from clipsae.data.cache import Cache, ImageLayout, write_manifest, write_shard
from clipsae.data.captions import captions_differ, texts_of
from clipsae.data.scenes import ScenesDataset
from clipsae.errors import ConfigError
from clipsae.store.files import sha256
from tests.data.counting import write_cache
from tests.data.test_image_folder import make

N = 12


@pytest.fixture(scope="module")
def clip():
    return FrozenCLIP.load("clipsae-tiny", "builtin", hook="towers")


@pytest.fixture(scope="module")
def scenes():
    return ScenesDataset("all", "train", N)


@pytest.fixture(scope="module")
def pairs(clip, scenes):
    """Of all images, in the dataset's order: [N, 2, e]."""
    with torch.no_grad():
        images = clip.encode_image(clip.normalize(scenes.images(range(N))[0]))
        texts = clip.encode_text(clip.tokenizer(scenes.captions(range(N))))
        return nn.functional.normalize(torch.stack((images, texts), dim=1), dim=-1)


def image_cache(folder, clip, scenes) -> Cache:
    layout = ImageLayout(images=N, shard_images=100, image_size=64)
    folder.mkdir()
    write_shard(folder, layout, 0, clip, scenes)
    file = folder / layout.file(0)
    sealed = [{"bytes": file.stat().st_size, "sha256": sha256(file)}]
    write_manifest(folder, layout, {}, sealed)
    return Cache(folder, kind=ImageLayout)


@torch.no_grad()
@pytest.mark.parametrize("source", ["online", "images", "tokens"])
def test_each_caption_is_beside_its_image(clip, scenes, pairs, tmp_path, source):
    cache = None
    if source == "images":
        cache = image_cache(tmp_path / "c", clip, scenes)
    elif source == "tokens":
        sizes = {"tokens": 2, "width": clip.width}
        cache = write_cache(tmp_path / "c", N, clip=clip, dataset=scenes, **sizes)
    data = FeatureDataModule(
        clip, scenes, batch_size=4, seed=1, cache=cache, val_dataset=scenes, needs=["embeddings"]
    )
    loader = data._loader()
    order = loader.order(0) if source == "online" else cache.images[loader.indices(0)]
    batches = list(loader)
    close = {"rtol": 1e-4, "atol": 1e-5}
    for batch, indices in zip(batches, order.split(4), strict=True):
        torch.testing.assert_close(batch["tokens"], pairs[indices], **close)
        torch.testing.assert_close(batch["embeddings"], pairs[indices, 0], **close)
    # Those of the first epoch; of a cache of tokens in another order.
    first, parts = data.first_batch(6), list(data.first_batches(6))
    assert [len(part) for part in parts] == [4, 2]
    assert torch.equal(torch.cat(parts), first)
    which = torch.cdist(first.flatten(1), pairs.flatten(1)).argmin(dim=1)
    torch.testing.assert_close(first, pairs[which], **close)
    seen = torch.cat(list(data.val_dataloader()))
    drawn = torch.randperm(N, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(seen, pairs[drawn], **close)


def test_captions_of_a_folder(tmp_path):
    images, file = tmp_path / "images", tmp_path / "captions.csv"
    make(images, "train/{red_fox,cat}/{1,2}.png", "test/{cat,red_fox}/3.png")
    rows = [
        *("train/cat/1.png,a cat", 'train/cat/2.png,"a cat, asleep"', "train/cat/1.png,not read"),
        *(
            "train/red_fox/1.png, a fox ",
            "train/red_fox/2.png,zwei Füchse",
            "elsewhere.png,nothing",
        ),
    ]
    file.write_text("\n".join(["file,caption", *rows]), encoding="utf-8-sig")
    data = ImageFolder(images, "train", image_size=4, captions=file)
    assert data.captions(range(4)) == ["a cat", "a cat, asleep", "a fox", "zwei Füchse"]
    assert data.captions(torch.tensor([2])) == ["a fox"]
    plain = ImageFolder(images, "train", image_size=4)
    assert plain.captions([0, 3]) == ["a photo of a cat.", "a photo of a red fox."]
    prints = {plain.fingerprint, data.fingerprint}
    file.write_text(file.read_text(encoding="utf-8-sig").replace("a fox", "a vixen"))
    prints.add(ImageFolder(images, "train", image_size=4, captions=file).fingerprint)
    assert len(prints) == 3
    with pytest.raises(ValueError, match=r"no caption of 2 of 2 images, such as test/cat/3\.png"):
        ImageFolder(images, "test", image_size=4, captions=file)
    with pytest.raises(FileNotFoundError, match=r"nowhere\.csv: there is no such file"):
        ImageFolder(images, "train", captions=tmp_path / "nowhere.csv")
    for content, said in (
        (b"path,text\n", "columns path, text: expected file and"),
        (b"\xff", "UTF-8"),
    ):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=said):
            ImageFolder(images, "train", captions=file)


def test_what_has_no_captions_is_refused(clip, tmp_path):
    make(tmp_path, "cat/{1,2}.png")
    cats = ImageFolder(tmp_path, "train", image_size=64)
    with pytest.raises(ConfigError, match="all images of the training have the same caption"):
        FeatureDataModule(clip, cats, batch_size=1)
    assert not captions_differ(cats)
    assert not captions_differ([])
    with pytest.raises(ConfigError, match=r"list has no captions: give it a method captions"):
        texts_of(clip, [])
    assert texts_of(FrozenCLIP(clip.model, name=clip.name), []) is None

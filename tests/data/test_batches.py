"""What a batch holds beside tokens, and of which tokens and layers: as each alone."""

from itertools import islice

import pytest
import torch
from torch import nn

from clipsae.data import FeatureDataModule
from clipsae.data.cache import Caches
from clipsae.data.loader import split, tensors
from tests.data.counting import Counting, Numbers, write_cache

N = 10


def stream(**options) -> FeatureDataModule:
    return FeatureDataModule(
        options.pop("clip", Counting()), Numbers(N), **{"batch_size": 4, "seed": 1, **options}
    )


def batches(data: FeatureDataModule, count: int = 3, after: int = 0) -> list:
    """The first batches of an epoch and the next; after a resumption that many later."""
    loader = data._loader()
    if after:
        loader.load_state_dict({**loader.state_dict(), "epoch": 0, "position": after})
    return list(islice(loader._read_from(loader.epoch, loader.position), count))


def equal(one, other) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    return one.keys() == other.keys() and all(equal(one[k], other[k]) for k in one)


@pytest.fixture(scope="module")
def caches(tmp_path_factory):
    folder = tmp_path_factory.mktemp("caches")
    return {
        layer: write_cache(folder / str(layer), N, clip=Counting(layer), shard_images=7)
        for layer in (-2, -1)
    }


@pytest.mark.parametrize("shuffle", [0, 8])
@pytest.mark.parametrize("cached", [False, True])
def test_several_layers_are_each_as_alone(caches, shuffle, cached):
    options = {"shuffle_buffer_images": shuffle, "block_images": 2, "buffer_images": 4}
    alone = {
        layer: stream(clip=Counting(layer), cache=caches[layer] if cached else None, **options)
        for layer in (-2, -1)
    }
    both = stream(layers=[-1, -2], cache=Caches(caches) if cached else None, **options)
    for after in (0, 1):
        found = batches(both, after=after)
        for layer, data in alone.items():
            assert all(
                equal(b[layer], own)
                for b, own in zip(found, batches(data, after=after), strict=True)
            )
    assert {layer: tuple(x.shape) for layer, x in both.first_batch(3).items()} == {
        -2: (3, 4, 1),
        -1: (3, 4, 1),
    }
    assert equal(both.first_batch(3)[-2], alone[-2].first_batch(3))


def test_the_target_is_of_the_same_tokens_however_they_are_mixed():
    for batch in batches(stream(target_layer=-2, shuffle_buffer_images=8)):
        assert torch.equal(batch["target"], -batch["tokens"])
    assert equal(stream(target_layer=-2).first_batch(4)["target"], -stream().first_batch(4))


def test_embeddings_are_the_whole_images_own():
    for batch in batches(stream(needs={"embeddings"}, tokens="patches")):
        image = batch["tokens"][:, 0, 0] - 1  # 4 i
        total = torch.stack((4 * image + 6, torch.ones(4)), dim=1)
        torch.testing.assert_close(batch["embeddings"], nn.functional.normalize(total))
    data = stream(needs={"embeddings"}, val_dataset=Numbers(4))
    assert isinstance(next(iter(data.val_dataloader())), torch.Tensor)  # in training alone
    with pytest.raises(ValueError, match=r"shuffle_buffer_images=8: .* set it to 0"):
        stream(needs={"embeddings"}, shuffle_buffer_images=8)


@pytest.mark.parametrize(("tokens", "kept"), [("patches", [1, 2, 3]), ("cls", [0])])
def test_tokens_are_chosen_before_they_are_mixed(tokens, kept):
    (first, second, _) = batches(stream(tokens=tokens))
    assert (first % 4)[..., 0].tolist() == [kept] * 4
    mixed = batches(stream(tokens=tokens, shuffle_buffer_images=8), 2)
    assert mixed[0].shape == first.shape
    both = torch.cat((first, second)).flatten().sort().values
    assert torch.equal(torch.cat(mixed).flatten().sort().values, both)
    assert (stream(tokens=tokens).first_batch(2) % 4).flatten().tolist() == kept * 2


def test_caches_of_other_images_are_not_read_together(tmp_path, caches):
    other = write_cache(tmp_path / "other", N, order_seed=1)
    with pytest.raises(ValueError, match="hold other images, or in another order"):
        Caches({-2: caches[-2], -1: other})


def test_nested_batches_are_split_as_their_tensors_are():
    x = torch.arange(10)
    nested = {-2: {"tokens": x, "target": -x}, -1: x + 100}
    parts = split(nested, 4)
    assert [len(part[-1]) for part in parts] == [4, 4, 2]
    assert parts[1][-2]["target"].tolist() == [-4, -5, -6, -7]
    assert len(list(tensors(nested))) == 3

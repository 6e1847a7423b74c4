"""The training's stream from a cache: every token once an epoch, well mixed, resumed exactly."""

from itertools import chain

import lightning
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from clipsae.data import FeatureDataModule
from clipsae.data.cache import CachedLoader, TokenCache
from clipsae.data.loader import ResumableLoader


class Recorder(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.seen: list[tuple[int, ...]] = []
        self.validated: list[tuple[int, ...]] = []

    def training_step(self, tokens, _):
        assert tokens.dtype == torch.float32
        assert not tokens.requires_grad
        self.seen.append(tuple(tokens.flatten().long().tolist()))
        return (self.weight * tokens).sum()

    def validation_step(self, tokens, _):
        self.validated.append(tuple(tokens.flatten().long().tolist()))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


def fit(max_steps, data, checkpoint=None, save=None):
    """Train; `save`: a folder for a checkpoint of every step."""
    module = Recorder()
    every = ModelCheckpoint(save, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    trainer = lightning.Trainer(
        max_steps=max_steps,
        accelerator="cpu",
        logger=False,
        callbacks=[every] if save else [],
        enable_checkpointing=save is not None,
        enable_progress_bar=False,
        enable_model_summary=False,
        val_check_interval=5,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
    )
    trainer.fit(module, datamodule=data, ckpt_path=checkpoint, weights_only=True)
    return module


@pytest.fixture
def stream(cache, counting, indices):
    """A DataModule on a cache of n images."""
    opened: dict[int, TokenCache] = {}

    def stream(n=110, **options) -> FeatureDataModule:
        if n not in opened:
            opened[n] = cache(n, folder=f"cache-{n}", shard_images=32)
        options = {"batch_size": 4, "seed": 1, "block_images": 8, "buffer_images": 24, **options}
        return FeatureDataModule(counting, indices(n), cache=opened[n], **options)

    return stream


def tokens_of(batches) -> list[list[int]]:
    """The tokens of each mixing block, in the order in which the loader brings them."""
    return [torch.cat(t).flatten().long().tolist() for t, _ in batches if t is not None]


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(12, 150),
    b=st.integers(1, 4),
    parts=st.integers(0, 4),
    world=st.integers(1, 3),
    block=st.integers(1, 20),
    buffer=st.integers(0, 40),
    shard=st.integers(1, 60),
)
def test_every_token_exactly_once_an_epoch(
    tmp_path_factory, n, b, parts, world, block, buffer, shard
):
    cache = Tokens(n, shard)
    loaders = [
        CachedLoader(
            cache,
            b,
            seed=3,
            shuffle_images=parts * b,
            rank=r,
            world_size=world,
            block_images=block,
            buffer_images=buffer,
        )
        for r in range(world)
    ]
    epochs = []
    for _ in range(2):
        seen = [list(loader) for loader in loaders]
        assert [len(batches) for batches in seen] == [n // (b * world)] * world
        tokens = list(chain(*chain(*(tokens_of(batches) for batches in seen))))
        assert len(tokens) == len(set(tokens)) == n // (b * world) * b * world * 4
        blocks = [block.seed for batches in seen for t, block in batches if t is not None]
        assert len(set(blocks)) == len(blocks)
        epochs.append(tokens)
    for loader in loaders:
        loader.close()


class Tokens:
    """What a loader needs of a cache, in memory."""

    block_images: int

    def __init__(self, n: int, shard: int) -> None:
        self.images = torch.randperm(n, generator=torch.Generator().manual_seed(shard))

    def __len__(self) -> int:
        return len(self.images)

    def read(self, positions, pin_memory=False):
        return (self.images[positions, None] * 4 + torch.arange(4)).unsqueeze(-1).float()


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("shuffle", [0, 12])
def test_every_token_of_a_real_cache_once_an_epoch(cache, world, shuffle):
    found = cache(110, shard_images=32)
    options = {"seed": 3, "shuffle_images": shuffle, "world_size": world, "buffer_images": 24}
    loaders = [CachedLoader(found, 4, rank=r, block_images=8, **options) for r in range(world)]
    for _ in range(2):
        tokens = list(chain(*chain(*(tokens_of(loader) for loader in loaders))))
        assert len(tokens) == len(set(tokens)) == 110 // (4 * world) * world * 16


@pytest.mark.parametrize("shuffle", [0, 8, 40])
@pytest.mark.parametrize("buffer", [0, 24])
def test_a_resumed_training_sees_the_very_next_batch(tmp_path, stream, shuffle, buffer):
    """27 batches an epoch: within a mixing block, within a buffer, at its end, at an epoch's."""

    def data():
        return stream(shuffle_buffer_images=shuffle, buffer_images=buffer)

    whole = fit(60, data(), save=tmp_path).seen
    assert len(whole) == 60
    assert sorted(whole[:27]) != sorted(whole[27:54])
    for stop in (1, 5, 6, 11, 26, 27, 28, 54):
        rest = fit(60, data(), checkpoint=tmp_path / f"step={stop}.ckpt").seen
        assert whole[:stop] + rest == whole, stop


def test_the_order_is_a_matter_of_seed_and_epoch_alone(cache):
    found = cache(200, shard_images=64)

    def epochs(seed=1, **options):
        loader = CachedLoader(found, 4, seed=seed, block_images=8, **options)
        return [tokens_of(loader), tokens_of(loader)]

    first = epochs()
    torch.manual_seed(99)
    assert epochs() == first
    assert first[0] != first[1]
    assert epochs(seed=2) != first
    assert epochs(buffer_images=16) != first
    before = torch.get_rng_state()
    epochs()
    assert torch.equal(torch.get_rng_state(), before)


def test_a_checkpoint_of_another_stream_is_refused(cache, indices):
    found = cache(100)
    state = CachedLoader(found, 4).state_dict()
    for changed in ({"block_images": 8}, {"buffer_images": 8}, {"seed": 1}):
        with pytest.raises(ValueError, match=next(iter(changed))):
            CachedLoader(found, 4, **changed).load_state_dict(state)
    with pytest.raises(ValueError, match="block_images"):
        CachedLoader(found, 4).load_state_dict(ResumableLoader(indices(100), 4).state_dict())


@pytest.mark.parametrize("changed", [{"block_images": 0}, {"buffer_images": -1}])
def test_sizes_that_cannot_be_are_refused(cache, changed):
    with pytest.raises(ValueError, match=next(iter(changed))):
        CachedLoader(cache(100), 4, **changed)


def test_blocks_of_one_image_come_in_the_online_order(stream, counting, indices):
    cached = fit(60, stream(block_images=1, buffer_images=0)).seen
    online = fit(60, FeatureDataModule(counting, indices(110), batch_size=4, seed=1)).seen
    assert cached == online


def test_validation_and_first_batch(stream, indices):
    data = stream(val_dataset=indices(6), shuffle_buffer_images=8)
    seen = fit(10, data)
    assert len(seen.validated) == 4
    assert sorted(chain(*seen.validated[:2])) == list(range(24))
    first = data.first_batch(8)
    assert first.shape == (8, 4, 1)
    assert first.dtype == torch.float32
    assert data.first_batch(1000).shape == (110, 4, 1)
    assert data._mixed is None
    assert data._train_loader._stream is None


def test_tokens_are_mixed_with_shuffle_buffer_images_and_images_stay_whole_without(stream):
    def images_of(batch):
        return len({token // 4 for token in batch})

    assert all(images_of(batch) == 4 for batch in fit(27, stream()).seen)
    assert min(images_of(batch) for batch in fit(20, stream(shuffle_buffer_images=40)).seen) > 8


def spread(order: torch.Tensor, b: int) -> float:
    """Variance of the images' numbers within batches of b, by their variance over all: 1 where a
    batch is a random sample, near 0 where it is a stretch of a folder."""
    batches = order[: len(order) // b * b].view(-1, b).float()
    return float(batches.var(dim=1).mean() / order.float().var())


def companions(one: torch.Tensor, two: torch.Tensor, b: int) -> float:
    """Of the pairs of images that share a batch of b in an epoch, the share that do in another;
    (b - 1) / (N - 1) where batches are independent."""
    batch = torch.empty(len(one), dtype=torch.long)
    batch[two] = torch.arange(len(two)) // b
    met = batch[one].view(-1, b)
    same = (met[:, :, None] == met[:, None, :]).sum() - met.numel()
    return float(same / (met.numel() * (b - 1)))


def test_images_are_mixed():
    """4,096 images sorted by class: the order on disk mixes classes, blocks and buffer companions.
    Either statistic fails where its part of the mixing is left out."""
    b = 32
    cache = Tokens(4096, 64)

    def epochs(**options):
        loader = CachedLoader(cache, b, **options)
        return [cache.images[loader.indices(epoch)] for epoch in (0, 1)]

    mixed = epochs()
    assert spread(mixed[0], b) == pytest.approx(1, abs=0.1)
    assert companions(*mixed, b) < 0.02  # 0.0076 where independent
    assert spread(torch.arange(4096), b) < 0.01
    unbuffered = epochs(buffer_images=0)
    assert spread(unbuffered[0], b) == pytest.approx(1, abs=0.1)
    assert companions(*unbuffered, b) > 0.9  # halves of the same blocks


def test_tokens_are_mixed(stream):
    """A batch of 32 x 4 tokens out of 1,024 images holds a few more than one of most of them."""
    seen = fit(32, stream(1100, batch_size=32, shuffle_buffer_images=1024, block_images=64)).seen
    images = [len({token // 4 for token in batch}) for batch in seen]
    expected = 1024 * (1 - (1 - 1 / 1024) ** 128)  # 120.3
    assert sum(images) / len(images) == pytest.approx(expected, abs=2)
    whole = fit(32, stream(1100, batch_size=32, block_images=64)).seen
    assert {len({token // 4 for token in batch}) for batch in whole} == {32}

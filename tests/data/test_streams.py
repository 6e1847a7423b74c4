"""Tokens reach the LightningModule in the right order, from images and from a cache: every token
once an epoch, well mixed, and resumed at the very next batch."""

import hashlib
from itertools import chain

import lightning
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch.callbacks import ModelCheckpoint
from PIL import Image
from torch import nn

from clipsae.clip import FrozenCLIP
from clipsae.data import FeatureDataModule, ImageFolder, ImageList
from clipsae.data.cache import TokenLoader
from clipsae.data.loader import ResumableLoader, image_batches
from tests.data.counting import Counting, Numbers, write_cache

N = 22  # five batches of 4 an epoch


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


def fit(max_steps, data, checkpoint=None, save=None, module=None, **options):
    """Train; `save`: a folder for a checkpoint of every step."""
    module = module or Recorder()
    every = ModelCheckpoint(
        save, filename="{step}", every_n_train_steps=1, save_top_k=-1, save_last=True
    )
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
        **options,
    )
    trainer.fit(module, datamodule=data, ckpt_path=checkpoint, weights_only=True)
    return module


def online(n=N, **options) -> FeatureDataModule:
    return FeatureDataModule(Counting(), Numbers(n), **{"batch_size": 4, "seed": 1, **options})


@pytest.fixture(scope="module")
def cached(tmp_path_factory):
    """A DataModule on a cache of n images."""
    caches = {}

    def cached(n=N, **options) -> FeatureDataModule:
        if n not in caches:
            folder = tmp_path_factory.mktemp("cached") / str(n)
            caches[n] = write_cache(folder, n, shard_images=32)
        return online(n, **{"cache": caches[n], "block_images": 8, "buffer_images": 24, **options})

    return cached


@pytest.fixture(params=["online", "cached"])
def stream(request, cached):
    return online if request.param == "online" else cached


# --- resumption ---


@pytest.mark.parametrize(
    ("where", "n", "options", "stops"),
    [
        ("online", N, {}, range(1, 12)),
        ("online", N, {"shuffle_buffer_images": 8, "val": 6}, range(1, 12)),
        ("online", N, {"shuffle_buffer_images": 12, "val": 6, "num_workers": 2}, (1, 4, 5, 11)),
        *(
            ("cached", 110, {"shuffle_buffer_images": s, "buffer_images": b}, (1, 5, 6, 26, 27, 54))
            for s, b in ((0, 0), (8, 24), (40, 24), (40, 0))
        ),
    ],
)
def test_a_resumed_training_sees_the_very_next_batch(tmp_path, cached, where, n, options, stops):
    """From Lightning's checkpoints of every step: within a mixing block, a buffer, an epoch, at
    their ends, and between an epoch's last batch and its end; `last` among them."""
    options = dict(options)
    held_out = options.pop("val", 0)

    def data():
        val = Numbers(held_out) if held_out else None
        return (online if where == "online" else cached)(n, val_dataset=val, **options)

    steps = 2 * (n // 4) + 2
    whole = fit(steps, data(), save=tmp_path).seen
    assert len(whole) == steps
    assert sorted(whole[: n // 4]) != sorted(whole[n // 4 : 2 * (n // 4)])
    for stop in stops:
        rest = fit(steps, data(), checkpoint=tmp_path / f"step={stop}.ckpt").seen
        assert whole[:stop] + rest == whole, stop
    longer = fit(steps + 2, data(), checkpoint=tmp_path / "last.ckpt").seen
    assert fit(steps + 2, data()).seen == whole + longer


# --- each token once ---


def test_each_token_once_an_epoch(stream):
    for shuffle in (0, 8):
        seen = fit(10, stream(shuffle_buffer_images=shuffle)).seen
        for epoch in (seen[:5], seen[5:]):
            tokens = list(chain(*epoch))
            assert len(tokens) == len(set(tokens)) == 80
        assert sorted(seen[:5]) != sorted(seen[5:])


class Tokens:
    """What a loader needs of a cache, in memory."""

    def __init__(self, n: int, shard: int) -> None:
        self.images = torch.randperm(n, generator=torch.Generator().manual_seed(shard))

    def __len__(self) -> int:
        return len(self.images)

    def read_parts(self, parts, pin_memory=False):
        return [
            (self.images[part, None] * 4 + torch.arange(4)).unsqueeze(-1).float() for part in parts
        ]


def tokens_of(batches) -> list[list[int]]:
    return [tokens.flatten().long().tolist() for tokens in batches]


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(12, 150),
    b=st.integers(1, 4),
    parts=st.integers(0, 4),
    world=st.integers(1, 3),
    block=st.integers(1, 20),
    buffer=st.integers(0, 40),
    shard=st.integers(1, 60),
)
def test_every_token_of_a_cache_exactly_once_an_epoch(n, b, parts, world, block, buffer, shard):
    seeds = []

    def transform(parts, seed):
        seeds.append(seed)
        return torch.cat(parts)

    options = {"seed": 3, "shuffle_images": parts * b, "world_size": world}
    options |= {"block_images": block, "buffer_images": buffer, "transform": transform}
    loaders = [TokenLoader(Tokens(n, shard), b, rank=r, **options) for r in range(world)]
    for _ in range(2):
        seen = [tokens_of(loader) for loader in loaders]
        assert [len(batches) for batches in seen] == [n // (b * world)] * world
        tokens = list(chain(*chain(*seen)))
        assert len(tokens) == len(set(tokens)) == n // (b * world) * b * world * 4
    assert len(set(seeds)) == len(seeds)  # no two blocks are mixed alike
    for loader in loaders:
        loader.close()


class Ranks(Recorder):
    """Writes what each rank saw, in another process."""

    def __init__(self, folder) -> None:
        super().__init__()
        self.folder = folder

    def on_train_end(self) -> None:
        torch.save(self.seen, self.folder / f"{self.global_rank}.pt")


@pytest.mark.skipif(torch.cuda.is_available(), reason="processes are forked, which CUDA forbids")
def test_two_ranks_share_an_epoch(tmp_path):
    ranks = {"strategy": "ddp_fork", "devices": 2}
    fit(2, online(shuffle_buffer_images=8), module=Ranks(tmp_path), **ranks)
    seen = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    tokens = list(chain(*seen[0], *seen[1]))
    assert len(tokens) == len(set(tokens)) == 4 * 16


# --- order ---


@pytest.mark.parametrize("rank", [0, 1])
def test_orders_are_the_same_as_ever(cached, rank):
    digests = []
    for stream in (online, cached):
        loader = stream(101, seed=3, shuffle_buffer_images=12)._loader(rank, 2)
        seen = tokens_of(chain(loader, loader))
        digests.append(hashlib.sha256(repr(seen).encode()).hexdigest()[:16])
    expected = ("c823da4dd6425abe", "c6e697f244530875"), ("3e7077881246c723", "7f6b27148592c089")
    assert tuple(digests) == expected[rank]


def test_the_order_is_a_matter_of_seed_and_epoch_alone(cached):
    def epochs(seed=1, **options):
        options = {"block_images": 8, **options}
        loader = TokenLoader(cached(200).cache, 4, seed=seed, **options)
        return [tokens_of(loader), tokens_of(loader)]

    before = torch.get_rng_state()
    first = epochs()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(99)
    assert epochs() == first
    assert first[0] != first[1]
    assert epochs(seed=2) != first
    assert epochs(buffer_images=16) != first


def test_blocks_of_one_image_come_in_the_online_order(cached):
    options = {"block_images": 1, "buffer_images": 0}
    assert fit(60, cached(110, **options)).seen == fit(60, online(110)).seen


@pytest.mark.parametrize(
    "changed", [{"block_images": 8}, {"buffer_images": 8}, {"seed": 1}, {"online": True}]
)
def test_a_checkpoint_of_another_stream_is_refused(cached, changed):
    cache = cached(110).cache
    if "online" in changed:
        changed, state = {"block_images": 64}, ResumableLoader(Numbers(110), 4).state_dict()
    else:
        state = TokenLoader(cache, 4).state_dict()
    with pytest.raises(ValueError, match=next(iter(changed))):
        TokenLoader(cache, 4, **changed).load_state_dict(state)


@pytest.mark.parametrize("changed", [{"block_images": 0}, {"buffer_images": -1}])
def test_invalid_sizes_are_refused(changed):
    with pytest.raises(ValueError, match=next(iter(changed))):
        TokenLoader(Tokens(100, 1), 4, **changed)


# --- mixing ---


def images_of(batch):
    return len({token // 4 for token in batch})


def test_tokens_are_mixed_within_a_block_and_not_without_one(stream):
    assert all(images_of(batch) == 4 for batch in fit(5, stream()).seen)
    mixed = fit(5, stream(shuffle_buffer_images=16)).seen
    assert max(map(images_of, mixed)) > 8
    assert images_of(mixed[4]) == 4  # the rest that fills no block


def test_each_block_is_mixed_by_its_seed():
    tokens = torch.arange(32).view(8, 4, 1)
    one, same, other = (online()._permuted(tokens, seed).flatten().tolist() for seed in (1, 1, 2))
    assert one == same != other
    assert sorted(one) == sorted(other) == list(range(32))


def test_tokens_are_mixed_well(cached):
    """A batch of 32 x 4 tokens out of 1,024 images holds a few more than one of most of them."""
    options = {"batch_size": 32, "block_images": 64}
    seen = fit(32, cached(1100, shuffle_buffer_images=1024, **options)).seen
    expected = 1024 * (1 - (1 - 1 / 1024) ** 128)  # 120.3
    assert sum(map(images_of, seen)) / len(seen) == pytest.approx(expected, abs=2)


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


def test_images_are_mixed_well():
    """4,096 images sorted by class: the order on disk mixes classes, blocks and buffer companions.
    Either statistic fails where its part of the mixing is left out."""
    b, cache = 32, Tokens(4096, 64)

    def epochs(**options):
        loader = TokenLoader(cache, b, **options)
        return [cache.images[loader.indices(epoch)] for epoch in (0, 1)]

    mixed = epochs()
    assert spread(mixed[0], b) == pytest.approx(1, abs=0.1)
    assert companions(*mixed, b) < 0.02  # 0.0076 where independent
    assert spread(torch.arange(4096), b) < 0.01
    unbuffered = epochs(buffer_images=0)
    assert spread(unbuffered[0], b) == pytest.approx(1, abs=0.1)
    assert companions(*unbuffered, b) > 0.9  # halves of the same blocks


# --- validation, first batch, bad images ---


@pytest.mark.parametrize("shuffle", [0, 8])
def test_validation_shows_the_same_unmixed_images_each_time(stream, shuffle):
    data = stream(val_dataset=Numbers(6), shuffle_buffer_images=shuffle)
    validated = fit(10, data).validated
    assert len(validated) == 4
    assert validated[:2] == validated[2:]
    assert sorted(chain(*validated[:2])) == list(range(24))
    for batch in validated:
        assert all(batch[i : i + 4] == tuple(range(batch[i], batch[i] + 4)) for i in range(0, 8, 4))
    assert data._train_loader._stream is None  # nothing is held after the training


def test_the_first_batch(stream):
    first = stream().first_batch(4)
    assert first.shape == (4, 4, 1)
    assert first.dtype == torch.float32
    assert stream().first_batch(100).shape == (N, 4, 1)
    parts = list(stream().first_batches(5))
    assert max(len(part) for part in parts) < 5
    assert torch.equal(torch.cat(parts), stream().first_batch(5))
    assert tuple(online().first_batch(4).flatten().tolist()) == fit(1, online()).seen[0]


@pytest.fixture
def partly_bad(tmp_path):
    files = [f"{i}.png" for i in range(8)]
    for i, file in enumerate(files):
        Image.new("RGB", (1, 1), (i * 4, 0, 0)).save(tmp_path / file)
    (tmp_path / files[5]).write_bytes(b"")
    return ImageList(tmp_path, files, [0] * 8, ["one"], image_size=1, on_bad_image="skip")


@pytest.mark.parametrize("steps", [4, 6])
def test_a_training_reports_what_it_skipped(partly_bad, caplog, steps):
    """At an epoch's end, which Lightning does not ask beyond, and within one."""
    fit(steps, FeatureDataModule(Counting(), partly_bad, batch_size=2, seed=0))
    assert caplog.text.count("1 images could not be read and were replaced") == 1
    assert "5.png" in caplog.text


def test_the_first_batch_with_bad_images_is_that_of_the_training(partly_bad):
    data = FeatureDataModule(Counting(), partly_bad, batch_size=8, seed=0)
    assert tuple(data.first_batch(8).flatten().long().tolist()) == fit(1, data).seen[0]


def test_photos_through_a_real_clip(photos):
    """The tokens are those of its prefix, in the loader's order; a backward pass takes them."""
    clip = FrozenCLIP.load("clipsae-tiny", None)
    dataset = ImageFolder(photos, "train", image_size=clip.image_size)
    data = FeatureDataModule(clip, dataset, batch_size=3, seed=2)
    wanted = data._loader().order(0)[:6]

    class Checker(Recorder):
        tokens: list[torch.Tensor] = []  # noqa: RUF012

        def training_step(self, tokens, _):
            assert tokens.dtype == torch.float32
            assert tokens.shape == (3, clip.tokens, clip.width)
            self.tokens.append(tokens)
            return (self.weight * tokens).mean()

    seen = torch.cat(fit(2, data, module=Checker()).tokens)
    ((images, _, _),) = image_batches(dataset, 6, indices=wanted)
    with torch.no_grad():
        torch.testing.assert_close(seen, clip.prefix(clip.normalize(images)))
    torch.testing.assert_close(data.first_batch(6), seen)

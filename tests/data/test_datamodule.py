"""Tokens reach the LightningModule in the right order, also after a checkpoint in mid-epoch."""

from itertools import chain

import lightning
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from PIL import Image
from torch import nn
from torch.utils.data import Dataset

from clipsae.clip import FrozenCLIP
from clipsae.data import FeatureDataModule, ImageFolder, ImageList
from clipsae.data.loader import image_batches


class Images(Dataset):
    """Image i: four pixels i * 4 + (0, 1, 2, 3)."""

    def __init__(self, n: int) -> None:
        self.labels = torch.arange(n)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int):
        pixels = index * 4 + torch.arange(4, dtype=torch.uint8).view(1, 2, 2)
        return pixels.expand(3, 2, 2), index


class Pixels(nn.Module):
    """A stand-in for the frozen CLIP: each pixel is a token [B, 4, 1]."""

    device = torch.device("cpu")

    def normalize(self, images):
        return images.float()

    def prefix(self, images):
        return images[:, :1].flatten(2).transpose(1, 2)


class Recorder(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.seen: list[tuple[int, ...]] = []
        self.validated: list[tuple[int, ...]] = []

    def training_step(self, tokens, _):
        assert not tokens.requires_grad
        self.seen.append(tuple(tokens.flatten().long().tolist()))
        return (self.weight * tokens).sum()

    def validation_step(self, tokens, _):
        self.validated.append(tuple(tokens.flatten().long().tolist()))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


def fit(max_steps, data, checkpoint=None, save=None, module=None, **options):
    module = module or Recorder()
    trainer = lightning.Trainer(
        max_steps=max_steps,
        accelerator="cpu",
        logger=False,
        enable_checkpointing="callbacks" in options,
        enable_progress_bar=False,
        enable_model_summary=False,
        val_check_interval=5,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        **options,
    )
    trainer.fit(module, datamodule=data, ckpt_path=checkpoint, weights_only=True)
    if save is not None:
        trainer.save_checkpoint(save)
    return module


def data(**options):
    return FeatureDataModule(Pixels(), Images(22), batch_size=4, seed=1, **options)


@pytest.mark.parametrize("shuffle", [0, 4, 8])
@pytest.mark.parametrize("stop", [1, 4, 5, 6, 10, 12])
def test_a_resumed_training_sees_the_very_next_batch(tmp_path, shuffle, stop):
    """Five batches an epoch: stops lie within an epoch, at its end, and in the third."""
    whole = fit(13, data(shuffle_buffer_images=shuffle)).seen
    assert len(whole) == 13
    first = fit(stop, data(shuffle_buffer_images=shuffle), save=tmp_path / "last.ckpt").seen
    second = fit(13, data(shuffle_buffer_images=shuffle), checkpoint=tmp_path / "last.ckpt").seen
    assert first + second == whole


@pytest.mark.parametrize(("shuffle", "workers", "held_out"), [(0, 0, None), (8, 0, 6), (12, 2, 6)])
def test_lightnings_own_checkpoints_of_every_step_continue_exactly(
    tmp_path, shuffle, workers, held_out
):
    """Also those written after an epoch's last batch and before its end; `last` among them."""

    def make():
        held = None if held_out is None else Images(held_out)
        return data(shuffle_buffer_images=shuffle, num_workers=workers, val_dataset=held)

    every = ModelCheckpoint(
        tmp_path,
        filename="{step}",
        every_n_train_steps=1,
        save_top_k=-1,
        save_last=True,
        enable_version_counter=False,
    )
    whole = fit(12, make(), callbacks=[every]).seen
    for step in range(1, 12):
        rest = fit(12, make(), checkpoint=tmp_path / f"step={step}.ckpt").seen
        assert whole[:step] + rest == whole, step
    again = ModelCheckpoint(tmp_path, save_last=True, enable_version_counter=False)
    assert fit(14, make(), checkpoint="last", callbacks=[again]).seen == fit(14, make()).seen[12:]


@pytest.mark.parametrize("shuffle", [0, 8])
def test_each_token_once_an_epoch(shuffle):
    seen = fit(10, data(shuffle_buffer_images=shuffle)).seen
    for epoch in (seen[:5], seen[5:]):
        tokens = list(chain(*epoch))
        assert len(tokens) == len(set(tokens)) == 80
    assert sorted(seen[:5]) != sorted(seen[5:])


def test_tokens_are_mixed_within_a_block_and_not_without_one():
    def images_of(batch):
        return {token // 4 for token in batch}

    assert all(len(images_of(b)) == 4 for b in fit(5, data()).seen)
    mixed = fit(5, data(shuffle_buffer_images=16)).seen
    assert max(len(images_of(b)) for b in mixed) > 8
    assert all(len(images_of(b)) == 4 for b in mixed[4:])  # the rest that fills no block


def test_each_block_has_a_mix_of_its_own():
    tokens = torch.arange(32).view(8, 4, 1)
    one, same, other = (data()._permuted(tokens, seed).flatten().tolist() for seed in (1, 1, 2))
    assert one == same != other
    assert sorted(one) == sorted(other) == list(range(32))


def test_workers_do_not_change_the_stream():
    assert fit(7, data(num_workers=2)).seen == fit(7, data()).seen


def test_validation_shows_the_same_images_each_time():
    validated = fit(10, data(val_dataset=Images(6))).validated
    assert len(validated) == 4
    assert validated[:2] == validated[2:]
    assert sorted(chain(*validated[:2])) == list(range(24))


def test_validation_tokens_are_not_mixed():
    validated = fit(5, data(val_dataset=Images(6), shuffle_buffer_images=8)).validated
    for batch in validated:
        assert all(batch[i : i + 4] == tuple(range(batch[i], batch[i] + 4)) for i in range(0, 8, 4))


def test_the_first_batch_is_that_of_the_training():
    first = data().first_batch(4)
    assert tuple(first.flatten().long().tolist()) == fit(1, data()).seen[0]
    assert data().first_batch(100).shape == (22, 4, 1)


def test_nothing_is_held_after_the_training():
    streamed = data(shuffle_buffer_images=8, num_workers=1)
    fit(3, streamed)
    assert streamed._mixed is None
    assert streamed._train_loader._stream is None


@pytest.fixture
def partly_bad(tmp_path):
    files = [f"{i}.png" for i in range(8)]
    for i, file in enumerate(files):
        Image.new("RGB", (2, 2), (i * 4, 0, 0)).save(tmp_path / file)
    (tmp_path / files[5]).write_bytes(b"")
    return ImageList(
        tmp_path, files, [0] * 8, ["one"], image_size=2, on_bad_image="skip", templates=None
    )


@pytest.mark.parametrize("steps", [4, 3, 6])
def test_a_training_says_what_it_skipped(partly_bad, caplog, steps):
    """At an epoch's end, which Lightning does not ask beyond, and within one."""
    streamed = FeatureDataModule(Pixels(), partly_bad, batch_size=2, seed=0)
    fit(steps, streamed)
    if steps >= 4:
        assert caplog.text.count("1 images could not be read and were replaced") == 1
        assert "5.png" in caplog.text


def test_the_first_batch_with_bad_images_is_that_of_the_training(partly_bad):
    streamed = FeatureDataModule(Pixels(), partly_bad, batch_size=8, seed=0)
    assert tuple(streamed.first_batch(8).flatten().long().tolist()) == fit(1, streamed).seen[0]


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
    fit(2, data(shuffle_buffer_images=8), module=Ranks(tmp_path), **ranks)
    seen = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    tokens = list(chain(*seen[0], *seen[1]))
    assert len(tokens) == len(set(tokens)) == 4 * 16


def test_photos_through_a_real_clip(photos):
    """The tokens are those of its own prefix, in the loader's order; a backward pass takes them."""
    clip = FrozenCLIP.load("clipsae-tiny", None)
    dataset = ImageFolder(photos, "train", image_size=clip.image_size)
    streamed = FeatureDataModule(clip, dataset, batch_size=3, seed=2)
    wanted = streamed._loader().order(0)[:6]

    class Checker(Recorder):
        tokens: list[torch.Tensor] = []  # noqa: RUF012

        def training_step(self, tokens, _):
            assert tokens.dtype == torch.float32
            assert tokens.shape == (3, clip.tokens, clip.width)
            self.tokens.append(tokens)
            return (self.weight * tokens).mean()

    seen = torch.cat(fit(2, streamed, module=Checker()).tokens)
    ((images, _, _),) = image_batches(dataset, 6, indices=wanted)
    with torch.no_grad():
        torch.testing.assert_close(seen, clip.prefix(clip.normalize(images)))
    torch.testing.assert_close(streamed.first_batch(6), seen)

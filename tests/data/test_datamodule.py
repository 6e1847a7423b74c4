"""Tokens reach the LightningModule in the right order, also after a checkpoint in mid-epoch."""

import lightning
import pytest
import torch
from torch import nn
from torch.utils.data import Dataset

from clipsae.data import FeatureDataModule


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


def fit(max_steps, data, checkpoint=None, save=None):
    module = Recorder()
    trainer = lightning.Trainer(
        max_steps=max_steps,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        val_check_interval=5,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
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
    whole = fit(13, data(shuffle_tokens=shuffle)).seen
    assert len(whole) == 13
    first = fit(stop, data(shuffle_tokens=shuffle), save=tmp_path / "last.ckpt").seen
    second = fit(13, data(shuffle_tokens=shuffle), checkpoint=tmp_path / "last.ckpt").seen
    assert first + second == whole


@pytest.mark.parametrize("shuffle", [0, 8])
def test_each_token_once_an_epoch(shuffle):
    seen = fit(10, data(shuffle_tokens=shuffle)).seen
    for epoch in (seen[:5], seen[5:]):
        tokens = sum(map(list, epoch), [])
        assert len(tokens) == len(set(tokens)) == 80
    assert sorted(seen[:5]) != sorted(seen[5:])


def test_tokens_are_mixed_within_a_block_and_not_without_one():
    def images_of(batch):
        return {token // 4 for token in batch}

    assert all(len(images_of(b)) == 4 for b in fit(5, data()).seen)
    mixed = fit(5, data(shuffle_tokens=16)).seen
    assert max(len(images_of(b)) for b in mixed) > 8
    assert all(len(images_of(b)) == 4 for b in mixed[4:])  # the rest that fills no block


def test_workers_do_not_change_the_stream():
    assert fit(7, data(num_workers=2)).seen == fit(7, data()).seen


def test_validation_shows_the_same_images_each_time():
    validated = fit(10, data(val_dataset=Images(6))).validated
    assert len(validated) == 4
    assert validated[:2] == validated[2:]
    assert sorted(sum(map(list, validated[:2]), [])) == list(range(24))


def test_the_first_batch_is_that_of_the_training():
    first = data().first_batch(4)
    assert tuple(first.flatten().long().tolist()) == fit(1, data()).seen[0]
    assert data().first_batch(100).shape == (22, 4, 1)

"""A training step of Lightning, with the engine that CUDA uses, reads nothing back to the host."""

from pathlib import Path

import pytest
import torch
from lightning import LightningDataModule, Trainer
from lightning.pytorch.callbacks import Callback

from clipsae.sae import engine
from clipsae.training.callbacks import Checkpoints, StepProgress, TokenRate
from clipsae.training.module import SAEGroup, SAEModule
from tests.benchmarks.setup import switched
from tests.sae.conftest import D, build, tokens
from tests.waits import hide_the_interpreter, no_waits


class Batches:
    epoch = 0

    def __init__(self, device: str) -> None:
        self.tokens = [tokens(2, 3, D, seed=seed).to(device) for seed in range(8)]

    def __len__(self):
        return 8

    def __iter__(self):
        return iter(self.tokens)

    def state_dict(self):
        return {}


class Stream(LightningDataModule):
    def __init__(self, device: str) -> None:
        super().__init__()
        self.device = device

    def train_dataloader(self):
        return Batches(self.device)

    def first_batch(self, images):
        return tokens(images, 3, D)


class Watched(Callback):
    """From the third step on, as the first ones make states and read the SAE's."""

    def __init__(self, device: str) -> None:
        self.waits = no_waits(device)
        self.steps = 0

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == 2:
            self.waits.__enter__()

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.steps += batch_idx >= 2
        if batch_idx == 5:
            self.waits.__exit__(None, None, None)


def train_without_waits(recipe: str, folder: Path, device: str, share: float) -> None:
    """Seven steps on a device, sparse up to this share of active pairs.

    Raises:
        RuntimeError: the host waits for the device in one of the third to the sixth.
    """
    member = SAEModule(
        build(recipe),
        learning_rate=1e-3,
        warmup_steps=2,
        max_steps=7,
        initial_images=2,
        gradient_clip_val=1.0,
        sparsity_warmup_steps=4 if recipe == "jumprelu" else 0,
        checkpoint=folder / "checkpoint.ckpt",
        progress=lambda step, steps, numbers: None,
    )
    watched = Watched(device)
    trainer = Trainer(
        accelerator="cpu" if device == "cpu" else "gpu",
        devices=1,
        max_steps=7,
        log_every_n_steps=100,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=True,
        logger=False,
        default_root_dir=folder,
        callbacks=[Checkpoints(every_n_steps=50), TokenRate(), StepProgress(), watched],
    )
    with switched(device, share):
        trainer.fit(SAEGroup([member]), datamodule=Stream(device))
    assert (member.step, watched.steps) == (7, 5)


@pytest.mark.skipif(torch.cuda.is_available(), reason="tests/gpu runs it there")
@pytest.mark.parametrize(
    ("recipe", "share"), [("sparsemax", 1.0), ("batch_topk", 1.0), ("jumprelu", 0.0)]
)
def test_steps_of_a_trainer(recipe, share, tmp_path, monkeypatch):
    monkeypatch.setitem(engine.BACKENDS, "cpu", engine.BACKENDS["cuda"])
    hide_the_interpreter(monkeypatch)
    train_without_waits(recipe, tmp_path, "cpu", share)
    with pytest.raises(RuntimeError, match="_local_scalar_dense"), no_waits("cpu"):
        float(torch.ones(()))

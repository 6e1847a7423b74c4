"""A training step of Lightning, with the engine that CUDA uses, reads nothing back to the host."""

import pytest
import torch
from lightning import LightningDataModule, Trainer
from lightning.pytorch.callbacks import Callback

from clipsae.sae import engine
from clipsae.sae.engine import gpu
from clipsae.sae.engine.switch import DENSE_FROM
from clipsae.training.callbacks import Checkpoints, StepProgress, TokenRate
from clipsae.training.module import SAEGroup, SAEModule
from tests.sae.conftest import D, build, tokens
from tests.waits import Waits


class Batches:
    epoch = 0

    def __len__(self):
        return 8

    def __iter__(self):
        return (tokens(2, 3, D, seed=seed) for seed in range(8))

    def state_dict(self):
        return {}


class Stream(LightningDataModule):
    def train_dataloader(self):
        return Batches()

    def first_batch(self, images):
        return tokens(images, 3, D)


class Watched(Callback):
    """From the third step on, as the first ones make states and read the SAE's."""

    def __init__(self) -> None:
        self.waits = Waits()
        self.steps = 0

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == 2:
            self.waits.__enter__()

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.steps += batch_idx >= 2
        if batch_idx == 5:
            self.waits.__exit__(None, None, None)


@pytest.mark.parametrize("recipe", ["sparsemax", "batch_topk"])
@pytest.mark.parametrize("sparse", [True, False], ids=["sparse", "dense"])
def test_steps_of_a_trainer(recipe, sparse, tmp_path, monkeypatch):
    monkeypatch.setitem(engine.BACKENDS, "cpu", engine.BACKENDS["cuda"])
    if sparse:
        monkeypatch.setitem(DENSE_FROM, "cpu", {1: 1.0, 2: 1.0})
    else:
        monkeypatch.delitem(DENSE_FROM, "cpu")
    launch = gpu._launch

    def unseen(*args, **kwargs):  # the interpreter's own reads
        with torch.utils._python_dispatch._disable_current_modes():
            launch(*args, **kwargs)

    monkeypatch.setattr(gpu, "_launch", unseen)
    monkeypatch.setattr(gpu._Look, "__call__", lambda self: False)
    member = SAEModule(
        build(recipe),
        learning_rate=1e-3,
        warmup_steps=2,
        max_steps=7,
        initial_images=2,
        gradient_clip_val=1.0,
        checkpoint=tmp_path / "checkpoint.ckpt",
        progress=lambda step, steps, numbers: None,
    )
    watched = Watched()
    trainer = Trainer(
        accelerator="cpu",
        max_steps=7,
        log_every_n_steps=100,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=True,
        logger=False,
        default_root_dir=tmp_path,
        callbacks=[Checkpoints(every_n_steps=50), TokenRate(), StepProgress(), watched],
    )
    trainer.fit(SAEGroup([member]), datamodule=Stream())
    assert (member.step, watched.steps) == (7, 5)
    assert watched.waits.seen == []

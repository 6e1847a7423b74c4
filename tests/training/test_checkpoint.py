"""The checkpoint a killed run continues from is whole, or known not to be."""

import os
import pickle
from types import SimpleNamespace

import pytest
import torch
from ddp_worker import configs, train

from clipsae.pretraining.train import load_checkpoint
from clipsae.store import Store, put_checkpoint, whole_checkpoint
from clipsae.training.callbacks import BusyCores, Checkpoints, StepProgress


class Member:
    """An SAE in training: one step a batch."""

    name, accumulating, done, max_steps, step, batches = "it", False, False, 9, 0, 0

    def __init__(self, path):
        self.checkpoint, self.told = path, []

    def training_state(self):
        return {"step": self.step}

    def progress(self, *told):
        self.told.append(told)


@pytest.fixture
def training(tmp_path):
    """A member, and what calls a callback after each of its batches."""
    member = Member(tmp_path / "last.ckpt")
    group = SimpleNamespace(members=[member], current=[member], each=lambda work: work(member))
    trainer = SimpleNamespace(
        world_size=1,
        is_global_zero=True,
        log_every_n_steps=10,
        val_check_batch=4,
        enable_validation=True,
        strategy=SimpleNamespace(barrier=lambda: None),
        train_dataloader=SimpleNamespace(state_dict=dict),
        fit_loop=SimpleNamespace(total_batch_idx=-1),
    )

    def batch(callback, validation=True):
        member.step += 1
        member.batches += 1
        trainer.fit_loop.total_batch_idx += 1
        callback.on_train_batch_end(trainer, group)
        if validation and member.batches % trainer.val_check_batch == 0:
            callback.on_validation_end(trainer, group)

    return member, batch


def saved(member) -> int | None:
    path = whole_checkpoint(member.checkpoint)
    return path and torch.load(path)["step"]


def test_a_checkpoint_is_sealed_and_a_failed_one_leaves_the_last(tmp_path, training, monkeypatch):
    member, batch = training
    callback = Checkpoints(every_n_steps=2)
    found = []
    for _ in range(5):
        batch(callback)
        found.append(saved(member))
    assert found == [None, 2, 2, 4, 4]

    def full(state, path):
        path.write_text("half of it")
        raise RuntimeError("file write failed")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        with pytest.raises(RuntimeError):
            batch(callback)
    assert saved(member) == 4
    assert sorted(p.name for p in tmp_path.iterdir()) == ["last.ckpt", "last.ckpt.json"]
    member.checkpoint.write_text("step 5")
    assert saved(member) is None


def test_it_is_written_after_the_validation_that_belongs_to_its_step(training):
    member, batch = training
    callback = Checkpoints(every_n_steps=4)
    for _ in range(4):
        batch(callback, validation=False)
    assert saved(member) is None
    member.step = member.batches = 7
    batch(callback)
    assert saved(member) == 8


def test_progress_is_reported_after_every_step(training):
    member, batch = training
    callback = StepProgress()
    callback.on_validation_end = lambda *_: None
    for _ in range(2):
        member.numbers = {}
        batch(callback)
    assert member.told == [(1, 9, None), (2, 9, None)]


@pytest.mark.parametrize(
    ("threads", "load", "warned"), [(2, 3.5, True), (2, 2.0, False), (1, 9.0, False)]
)
def test_a_busy_machine_is_told_once(monkeypatch, caplog, threads, load, warned):
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    monkeypatch.setattr(os, "getloadavg", lambda: (load, 0.0, 0.0))
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    module = SimpleNamespace(device=torch.device("cpu"))
    callback = BusyCores()
    for batch in range(30):
        loop = SimpleNamespace(total_batch_idx=batch)
        callback.on_train_batch_end(SimpleNamespace(fit_loop=loop, log_every_n_steps=10), module)
    assert caplog.text.count("this machine is busy") == warned


class Hostile:
    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


def test_a_hostile_checkpoint_runs_no_code(tmp_path):
    """One with the right checksum, which whoever can write there can make, too."""
    caught = tmp_path / "caught"
    hostile = {"state_dict": Hostile(f"touch {caught}")}
    stage = Store(tmp_path / "run" / "store").stage("sae", ["relu"], {})
    stage.scratch.mkdir(parents=True)
    for path in (stage.scratch / "last.ckpt", tmp_path / "pretrain.ckpt"):
        torch.save(hostile, path.with_suffix(".tmp"))
        put_checkpoint(path.with_suffix(".tmp"), path, 1)
    (cfg,) = configs(
        ["relu"], ["model.latents=64", "trainer.max_steps=9", "trainer.accelerator=cpu"]
    )
    with pytest.raises(pickle.UnpicklingError, match="eights"):
        train(cfg, tmp_path / "run")
    with pytest.raises(pickle.UnpicklingError, match="eights"):
        load_checkpoint(tmp_path / "pretrain.ckpt", None, [])
    assert not caught.exists()
    torch.load(tmp_path / "pretrain.ckpt", weights_only=False)  # which would have
    assert caught.exists()

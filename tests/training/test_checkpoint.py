"""The checkpoint a killed run continues from is whole, or known not to be."""

import os
import pickle
from types import SimpleNamespace

import pytest
import torch
from ddp_worker import configs, train

from clipsae.pretraining.train import load_checkpoint
from clipsae.store import Store, put_checkpoint, whole_checkpoint
from clipsae.training.callbacks import BusyCores, ReportProgress, ResumeCheckpoint


class FakeTrainer(SimpleNamespace):
    world_size, is_global_zero, max_steps, val_check_batch = 1, True, 9, None
    enable_validation = False

    def save_checkpoint(self, path):
        path.write_text(f"step {self.global_step}")
        if self.full:
            raise RuntimeError("file write failed")


def test_it_is_sealed_and_a_failed_one_leaves_the_last(tmp_path):
    path = tmp_path / "last.ckpt"
    callback = ResumeCheckpoint(path, every_n_steps=2)
    for step in range(1, 6):
        callback.on_train_batch_end(FakeTrainer(global_step=step, full=False))
    assert whole_checkpoint(path).read_text() == "step 4"
    with pytest.raises(RuntimeError):
        callback.on_train_batch_end(FakeTrainer(global_step=6, full=True))
    assert whole_checkpoint(path).read_text() == "step 4"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["last.ckpt", "last.ckpt.json"]
    path.write_text("step 5")
    assert whole_checkpoint(path) is None


def test_it_is_written_after_the_look_that_belongs_to_its_step(tmp_path):
    path = tmp_path / "last.ckpt"
    callback = ResumeCheckpoint(path, every_n_steps=2)
    loops = SimpleNamespace(epoch_loop=SimpleNamespace(total_batch_idx=3))
    trainer = FakeTrainer(
        global_step=2, full=False, enable_validation=True, val_check_batch=4, fit_loop=loops
    )
    callback.on_train_batch_end(trainer)  # the fourth batch, of the second step
    assert not path.exists()
    callback.on_validation_end(trainer, None)
    assert whole_checkpoint(path).read_text() == "step 2"
    path.unlink()
    callback.on_validation_end(trainer, None)  # in the midst of the third step's batches
    assert not path.exists()
    loops.epoch_loop.total_batch_idx = 5
    trainer.global_step = 4
    callback.on_train_batch_end(trainer)
    assert whole_checkpoint(path).read_text() == "step 4"


def test_progress_is_reported_after_every_step():
    told = []
    callback = ReportProgress(lambda done, total: told.append((done, total)))
    for step in (1, 2):
        callback.on_train_batch_end(FakeTrainer(global_step=step))
    assert told == [(1, 9), (2, 9)]


@pytest.mark.parametrize(
    ("threads", "load", "warned"), [(2, 3.5, True), (2, 2.0, False), (1, 9.0, False)]
)
def test_a_busy_machine_is_told_once(monkeypatch, caplog, threads, load, warned):
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    monkeypatch.setattr(os, "getloadavg", lambda: (load, 0.0, 0.0))
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    module = SimpleNamespace(device=torch.device("cpu"))
    callback = BusyCores()
    for step in range(1, 30):
        callback.on_train_batch_end(FakeTrainer(global_step=step, log_every_n_steps=10), module)
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
        ["relu"], ["model.latents=64", "trainer.max_steps=2", "trainer.accelerator=cpu"]
    )
    with pytest.raises(pickle.UnpicklingError, match="eights"):
        train(cfg, tmp_path / "run")
    with pytest.raises(pickle.UnpicklingError, match="eights"):
        load_checkpoint(tmp_path / "pretrain.ckpt", None, [])
    assert not caught.exists()
    torch.load(tmp_path / "pretrain.ckpt", weights_only=False)  # which would have
    assert caught.exists()

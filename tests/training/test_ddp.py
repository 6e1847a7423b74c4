"""Two processes train what one does on the same images."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from ddp_worker import configs, train
from safetensors.torch import load_file

from run import ROOT

MODELS = ["relu", "sparsemax", "topk", "batch_topk"]
STEPS = 12
OVERRIDES = [
    "model.latents=256",
    "model.dead_after=100",  # so that some are
    f"trainer.max_steps={STEPS}",
    "trainer.accelerator=cpu",
    "trainer.log_every_n_steps=3",
    "trainer.val_check_interval=12",
    "trainer.limit_val_batches=1",
    "callbacks.progress_bar=false",
    "callbacks.checkpoint_every_n_steps=6",  # its sums are those of all ranks
    "dataset.size=40",
]


def free_ports(count: int) -> list[str]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [str(some.getsockname()[1]) for some in sockets]
    for some in sockets:
        some.close()
    return ports


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """alone/MODEL and together/MODEL: the same eight images a step, on one rank and on two."""
    folder = tmp_path_factory.mktemp("ddp")
    worker = Path(__file__).with_name("ddp_worker.py")
    overrides = [*OVERRIDES, "trainer=ddp", "features.batch_size=4"]
    ports = ",".join(free_ports(len(MODELS)))
    ranks = []
    for rank in "01":
        env = {
            **os.environ,
            "MASTER_ADDR": "127.0.0.1",
            "WORLD_SIZE": "2",
            "LOCAL_RANK": rank,
            "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        }
        command = [sys.executable, worker, folder / "together", ",".join(MODELS), ports, *overrides]
        log = (folder / f"{rank}.log").open("w")
        ranks.append(subprocess.Popen(command, env=env, stdout=log, stderr=subprocess.STDOUT))
    for cfg, model in zip(
        configs(MODELS, [*OVERRIDES, "features.batch_size=8"]), MODELS, strict=True
    ):
        train(cfg, folder / "alone" / model)
    for rank, process in enumerate(ranks):
        assert process.wait(120) == 0, (folder / f"{rank}.log").read_text()
    return folder


def sae_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "sae.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
def test_weights_and_statistics_are_those_of_one_process(trained, model):
    alone, together = sae_of(trained / "alone" / model), sae_of(trained / "together" / model)
    assert alone.keys() == together.keys()
    for name, expected in alone.items():
        if expected.is_floating_point():  # found: 5e-8 on weights up to 0.2
            torch.testing.assert_close(together[name], expected, rtol=1e-5, atol=1e-6, msg=name)
        else:
            assert torch.equal(together[name], expected), name
    if model == "sparsemax":  # counters that only the sum over ranks gives
        assert (alone["tokens_since_fired"] > 3000).any()
        assert (alone["activation.frequency"] > 0.0987).any()


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
def test_the_loss_is_that_of_one_process(trained, model):
    alone, together = (
        json.loads((trained / which / model / "training.json").read_text())
        for which in ("alone", "together")
    )
    assert alone["steps"] == together["steps"] == STEPS
    if model in ("topk", "batch_topk"):  # dead latents learned, too
        assert alone["train/loss/auxk"] > 0
    for name in ("train/loss", "train/fvu", "train/l0", "train/dead_fraction"):
        assert together[name] == pytest.approx(alone[name], rel=1e-6), name

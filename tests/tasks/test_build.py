"""From a config to objects."""

import pytest
import torch
from omegaconf import OmegaConf

from clipsae.errors import ConfigError
from clipsae.tasks.build import best_device, build_dataset


@pytest.mark.parametrize(
    ("gpus", "variables", "expected"),
    [
        (0, {"SLURM_LOCALID": "1"}, "cpu"),
        (4, {}, "cuda:0"),
        (4, {"SLURM_LOCALID": "3"}, "cuda:3"),
        (4, {"LOCAL_RANK": "2"}, "cuda:2"),
        # Lightning's own processes, started in an allocation of one task.
        (4, {"SLURM_LOCALID": "0", "LOCAL_RANK": "2"}, "cuda:2"),
        (1, {"SLURM_LOCALID": "3"}, "cuda:0"),  # the one that SLURM shows to this task
    ],
)
def test_a_rank_uses_its_own_gpu(monkeypatch, gpus, variables, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    for name in ("SLURM_LOCALID", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert best_device() == torch.device(expected)


def test_what_a_dataset_lacks_is_one_sentence():
    node = OmegaConf.create({"_target_": "types.SimpleNamespace", "name": "x", "labels": [0]})
    with pytest.raises(ConfigError, match="lack classnames, templates, fingerprint; expected are"):
        build_dataset(node, "train", 64)

"""From images to logits on the meta device, which has no numbers: what stays on the CPU raises."""

import copy

import pytest
import torch

from clipsae.clip import FrozenCLIP
from clipsae.data.datamodule import FeatureDataModule
from clipsae.data.scenes import ScenesDataset
from clipsae.sae import SAE


@pytest.fixture
def on_meta(monkeypatch):
    # The meta device has no autocast; and pinned memory is of a GPU's driver.
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *device: False)
    return copy.deepcopy(FrozenCLIP.load("clipsae-tiny", "builtin")).to("meta")


@pytest.mark.parametrize("buffer", [0, 8])
def test_prefix_stream_and_tail(on_meta, buffer):
    clip = on_meta
    scenes = ScenesDataset(kind="all", split="train", size=16, image_size=clip.image_size)
    module = FeatureDataModule(clip, scenes, batch_size=4, shuffle_buffer_images=buffer)
    images = [torch.zeros(4, 3, clip.image_size, clip.image_size, dtype=torch.uint8)] * 2
    tokens = module._batch(images, seed=0)
    assert tokens.is_meta
    assert tokens.shape == (8, clip.tokens, clip.width)
    assert module.first_batch(3).shape == (3, clip.tokens, clip.width)
    with torch.device("meta"):
        sae = SAE(clip.width, 64, activation="relu").eval()
    classes = torch.zeros(5, clip.embed_dim, device="meta")
    assert clip.logits(sae(tokens).reconstruction, classes).shape == (8, 5)
    with pytest.raises((RuntimeError, NotImplementedError)):
        clip.logits(tokens.to("cpu"), classes)

"""A small world that the tests of this folder share: an SAE with random weights on the built-in
CLIP, a dozen images, classes without meaning, and the SAE's references."""

from types import SimpleNamespace

import pytest
import torch

from clipsae.clip import FrozenCLIP
from clipsae.data.scenes import ScenesDataset
from clipsae.sae import SAE
from clipsae.visualization import collect_references


@pytest.fixture(scope="session")
def world():
    torch.manual_seed(0)
    clip = FrozenCLIP.load("clipsae-tiny", "builtin")
    sae = SAE(clip.width, 40, "attention", "sparsemax", normalize="unit", scale=0.1).eval()
    dataset = ScenesDataset("colour", "test", 12)
    classifier = torch.nn.functional.normalize(torch.randn(10, clip.embed_dim), dim=-1)
    found = collect_references(clip, {"it": sae}, dataset, name="colour", split="test")
    return SimpleNamespace(
        clip=clip, sae=sae, dataset=dataset, classifier=classifier, references=found["it"]
    )

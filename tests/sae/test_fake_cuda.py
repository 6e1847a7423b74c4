"""Steps at the paper's size on tensors without numbers: tensors left on the CPU, shapes that do not
fit, and whatever would need a number on the host raise.

Forward on fake CUDA tensors; whole steps on the meta device, as torch's backward needs a real one.
"""

from contextlib import nullcontext

import pytest
import torch
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)

from clipsae.sae import SAE, engine
from clipsae.sae.codes import SparseCodes
from clipsae.sae.engine import gpu
from clipsae.sae.engine.switch import DENSE_FROM
from tests.sae.conftest import options_of

DENSE = ("matching_pursuit",)
TOKENS, WIDTH, LATENTS = (32, 197), 768, 49_152


@pytest.fixture(autouse=True)
def no_numbers(monkeypatch):
    monkeypatch.setattr(gpu, "_launch", lambda *args, **constants: None)
    monkeypatch.setattr(gpu._Look, "__init__", lambda *args: None)
    monkeypatch.setattr(gpu._Look, "__call__", lambda self: False)
    # The meta device has no autocast.
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device_type: False)
    monkeypatch.setattr(torch, "autocast", lambda *args, **options: nullcontext())
    # That none can be dead is known once it was read.
    monkeypatch.setattr(SAE, "_may_be_dead", lambda self, tokens: True)


def build(recipe: str, device: str) -> SAE:
    options = options_of(recipe, latents=LATENTS)
    if recipe != "matching_pursuit":
        options["auxk"] = 0.1
    with torch.device(device):
        return SAE(WIDTH, **options)


@pytest.mark.parametrize("sparse", [True, False], ids=["sparse", "dense"])
def test_training(recipe, sparse, monkeypatch):
    monkeypatch.setitem(engine.BACKENDS, "meta", engine.BACKENDS["cuda"])
    if sparse:
        monkeypatch.setitem(DENSE_FROM, "meta", DENSE_FROM["cuda"])
    sae = build(recipe, "meta")
    optimizer = torch.optim.Adam(sae.parameters())
    x = torch.randn(*TOKENS, WIDTH, device="meta")
    for _ in range(2):
        optimizer.zero_grad()
        out = sae(x)
        sparse = sparse and recipe not in DENSE
        assert isinstance(out.encoded, SparseCodes) == sparse
        out.loss.backward()
        sae.after_backward()
        optimizer.step()
        sae.after_step()
    assert out.reconstruction.shape == x.shape
    assert out.fired().shape == (LATENTS,)
    assert out.encoded.device.type == "meta" if not sparse else out.encoded.values.is_meta
    for name, parameter in sae.named_parameters():
        assert parameter.grad is None or parameter.grad.is_meta, name
    assert all(buffer.is_meta for buffer in sae.buffers())


@pytest.mark.parametrize("sparse", [True, False], ids=["sparse", "dense"])
def test_forward_on_fake_cuda(recipe, sparse, monkeypatch):
    if not sparse:
        monkeypatch.delitem(DENSE_FROM, "cuda")
    with FakeTensorMode():
        sae, x = build(recipe, "cuda"), torch.randn(*TOKENS, WIDTH, device="cuda")
        out = sae(x)
        assert isinstance(out.encoded, SparseCodes) == (sparse and recipe not in DENSE)
        assert out.reconstruction.device.type == out.loss.device.type == "cuda"
        sae.eval()
        assert sae(x).codes.shape == (*TOKENS, LATENTS)
        # How many there are is read.
        with pytest.raises((DataDependentOutputException, DynamicOutputShapeException)):
            sae.encode_sparse(x)

"""Files as other libraries write them, made by hand, at a size for tests."""

import json
import sys
import types
from pathlib import Path

import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor

D, M, K = 12, 40, 5

MATRICES = {"W_enc": (D, M), "b_enc": (M,), "W_dec": (M, D), "b_dec": (D,)}
LINEAR = {"encoder.weight": (M, D), "encoder.bias": (M,), "decoder.weight": (D, M)}
SPARSIFY = {"encoder.weight": (M, D), "encoder.bias": (M,), "W_dec": (M, D), "b_dec": (D,)}
SIMPLE = {"encoder.weight": (M, D), "encoder.bias": (M,), "decoder.weight": (M, D)}
RELEASE = {"concept": (M, D), "k": (D, D), "v": (D, D)}


def weights(**shapes) -> dict[str, Tensor]:
    """Random tensors of these shapes; tensors pass unchanged."""
    generator = torch.Generator().manual_seed(3)
    return {
        name: shape if isinstance(shape, Tensor) else torch.randn(shape, generator=generator)
        for name, shape in shapes.items()
    }


def container(folder: Path, cfg, state) -> Path:
    torch.save({"cfg": cfg, "state_dict": state}, folder / "sae.pt")
    return folder / "sae.pt"


def saelens(folder: Path, cfg, state) -> Path:
    (folder / "cfg.json").write_text(json.dumps({"d_in": D, "d_sae": M, **cfg}))
    save_file(state, folder / "sae_weights.safetensors")
    return folder


def sparsify(folder: Path, cfg, state) -> Path:
    cfg = {"d_in": D, "k": K, "activation": "topk", "num_latents": 0, "multi_topk": False, **cfg}
    (folder / "cfg.json").write_text(json.dumps(cfg))
    save_file(state, folder / "sae.safetensors")
    return folder


def dictionary_learning(folder: Path, cfg, state) -> Path:
    trainer = {"dict_class": "AutoEncoder", "lr": 1e-3, **cfg}
    (folder / "config.json").write_text(json.dumps({"trainer": trainer}))
    torch.save(state, folder / "ae.pt")
    return folder


def visaebench(folder: Path, cfg, state, file: str = "sae.pt", about: str = "config.json") -> Path:
    dump = json.dumps if about == "config.json" else yaml.safe_dump
    (folder / about).write_text(dump({"activation": "topk", "k": K, **cfg}))
    torch.save(state, folder / file) if file == "sae.pt" else save_file(state, folder / file)
    return folder


FORMATS = {
    "container": (container, MATRICES),
    "SAELens": (saelens, MATRICES),
    "sparsify": (sparsify, SPARSIFY),
    "dictionary_learning": (dictionary_learning, {**LINEAR, "bias": (D,)}),
    "visaebench": (visaebench, SIMPLE),
}


def pickled(monkeypatch, full_name: str, values: dict):
    """An object of a class of somebody's training code, as their checkpoints hold one; the class is
    gone when the file is read."""
    module, _, name = full_name.rpartition(".")
    cls = type(name, (), {"__module__": module})
    parts = module.split(".")
    for i in range(1, len(parts) + 1):
        parent = ".".join(parts[:i])
        if parent not in sys.modules:
            monkeypatch.setitem(sys.modules, parent, types.ModuleType(parent))
    monkeypatch.setattr(sys.modules[module], name, cls, raising=False)
    held = cls()
    vars(held).update(values, dtype=torch.float32, device=torch.device("cpu"))
    return held

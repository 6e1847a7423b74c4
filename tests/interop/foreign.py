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
MSAE = {"encoder": (D, M), "latent_bias": (M,), "decoder": (M, D), "pre_bias": (D,)}
CLIPSCOPE = {"enc": (D, M), "dec": (M, D), "pre_b": (D,)}
RELEASE = {"concept": (M, D), "k": (D, D), "v": (D, D)}


def weights(**shapes) -> dict[str, Tensor]:
    """Random tensors of these shapes; tensors pass unchanged."""
    generator = torch.Generator().manual_seed(3)
    return {
        name: shape if isinstance(shape, Tensor) else torch.randn(shape, generator=generator)
        for name, shape in shapes.items()
    }


def container(folder: Path, cfg, state) -> Path:
    """As a training with an L1 penalty writes it, unless its config says otherwise."""
    if isinstance(cfg, dict) and "sae_type" not in cfg:
        cfg = {"l1_coefficient": 1e-4, **cfg}
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


def batchtopk(folder: Path, cfg, state) -> Path:
    cfg = {"sae_type": "topk", "act_size": D, "dict_size": M, "top_k": K, "lr": 3e-4, **cfg}
    (folder / "config.json").write_text(json.dumps(cfg))
    torch.save(state, folder / "sae.pt")
    return folder


def prisma(folder: Path, cfg, state) -> Path:
    dtype = {"__type__": "torch.dtype", "value": "torch.float32"}
    usual = {"model_class_name": "HookedViT", "is_transcoder": False, "d_out": 7, "dtype": dtype}
    usual |= {"normalize_activations": "none", "activation_fn_str": "relu"}
    (folder / "config.json").write_text(json.dumps({**usual, **cfg}))
    torch.save(state, folder / "weights.pt")
    return folder


def saev(folder: Path, cfg, state) -> Path:
    """`cfg` has the header's entries; `schema` None is the first version."""
    relu = {"activation": {"cls": "Relu", "params": {}}}
    header = {"schema": 5, "cfg": relu, "lib": "1", "commit": "a1b2c3", **cfg}
    header = header.pop("cfg", {}) if header["schema"] is None else header
    with (folder / "sae.pt").open("wb") as file:
        file.write(json.dumps(header).encode() + b"\n")
        torch.save(state, file)
    return folder / "sae.pt"


def msae(folder: Path, cfg, state) -> Path:
    """`cfg` has the file's entries beside the weights, and its `name`."""
    cfg = dict(cfg)
    path = folder / cfg.pop("name", f"{M}_{D}_ReLU_003_False_False_0.0_cc3m.pth")
    usual = {"mean_center": 0, "scaling_factor": 1.0, "target_norm": None}
    torch.save({"model": state, **usual, **cfg}, path)
    return path


def clipscope(folder: Path, cfg, state) -> Path:
    cfg = {"n_features": M, "d_in": D, "k": K, **cfg}
    torch.save({"model_state_dict": state, **cfg}, folder / "sae.pt")
    return folder / "sae.pt"


FORMATS = {
    "container": (container, MATRICES),
    "SAELens": (saelens, MATRICES),
    "sparsify": (sparsify, SPARSIFY),
    "dictionary_learning": (dictionary_learning, {**LINEAR, "bias": (D,)}),
    "visaebench": (visaebench, SIMPLE),
    "BatchTopK": (batchtopk, {**MATRICES, "b_enc": torch.zeros(M)}),
    "ViT-Prisma": (prisma, MATRICES),
    "saev": (saev, MATRICES),
    "MSAE": (msae, MSAE),
    "clipscope": (clipscope, CLIPSCOPE),
}


def pickled(monkeypatch, full_name: str, values: dict):
    """An object of a class of somebody's training code, as their checkpoints hold one; the class is
    gone when the file is read."""
    held = instance(monkeypatch, full_name)
    vars(held).update(values, dtype=torch.float32, device=torch.device("cpu"))
    return held


def instance(monkeypatch, full_name: str):
    """An object without attributes, of a class of this name."""
    module, _, name = full_name.rpartition(".")
    cls = type(name, (), {"__module__": module})
    parts = module.split(".")
    for i in range(1, len(parts) + 1):
        parent = ".".join(parts[:i])
        if parent not in sys.modules:
            monkeypatch.setitem(sys.modules, parent, types.ModuleType(parent))
    monkeypatch.setattr(sys.modules[module], name, cls, raising=False)
    return cls()


def module(monkeypatch, name: str, tensors=None, modules=None, **attributes):
    """A module of overcomplete as it is pickled, in evaluation mode."""
    held = instance(monkeypatch, f"overcomplete.sae.{name}")
    vars(held).update({"training": False, "_buffers": {}, "_modules": modules or {}})
    vars(held).update({"_parameters": {} if tensors is None else tensors, **attributes})
    return held

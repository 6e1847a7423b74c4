"""Files of weights as people have them, read as tensors with open_clip's names.

Read are safetensors and what `torch.save` wrote (a state dict, or a checkpoint of open_clip's
training), the TorchScript archives that OpenAI distributes (`ViT-B-16.pt`), and CLIP in the format
of transformers (`openai/clip-vit-base-patch16`).
"""

import json
import re
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from open_clip.convert import convert_state_dict
from open_clip.model import (
    convert_to_custom_text_state_dict,
    resize_pos_embed,
    resize_text_pos_embed,
)
from safetensors.torch import load_file
from torch import Tensor, nn

# What archives hold beside weights: OpenAI's the sizes, all of them a mask.
_NO_WEIGHTS = ("input_resolution", "context_length", "vocab_size", "attn_mask")
_WRAPPERS = ("module.", "_orig_mod.", "model.")
# In this order, from transformers' names to open_clip's.
_FROM_TRANSFORMERS = {
    "text_model.embeddings.token_embedding": "token_embedding",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.encoder.layers": "transformer.resblocks",
    "text_model.final_layer_norm": "ln_final",
    "text_projection.weight": "text_projection",
    "vision_model.embeddings.class_embedding": "visual.class_embedding",
    "vision_model.embeddings.patch_embedding": "visual.conv1",
    "vision_model.embeddings.position_embedding.weight": "visual.positional_embedding",
    "vision_model.encoder.layers": "visual.transformer.resblocks",
    "vision_model.pre_layrnorm": "visual.ln_pre",  # (their spelling)
    "vision_model.post_layernorm": "visual.ln_post",
    "visual_projection.weight": "visual.proj",
    "self_attn.out_proj": "attn.out_proj",
    "layer_norm": "ln_",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}


class Inert(dict):
    """Stands for a pickled object of a class whose code is never imported."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__()

    def __setstate__(self, state: Any) -> None:
        """Nothing of it is needed."""


@dataclass(frozen=True)
class Weights:
    """What a file holds.

    Attributes:
        tensors: by open_clip's names.
        quick_gelu: whether they were trained with QuickGELU; None: the file does not say.
        preprocess: mean and std, where a config beside the file gives them.
    """

    tensors: dict[str, Tensor]
    quick_gelu: bool | None
    preprocess: dict[str, Any] = field(default_factory=dict)


def read_weights(path: Path) -> Weights:
    """Read a file and the config beside it.

    Raises:
        ValueError: it cannot be read, or holds something else.
    """
    quick_gelu = None
    try:
        if path.suffix == ".safetensors":
            content: Any = load_file(path)
        elif _is_torchscript(path):
            content, quick_gelu = _read_torchscript(path)
        else:
            content = _read_pickle(path)
    except Exception as error:  # a broken or hostile file can make a reader raise anything
        asked = re.search(r"GLOBAL (\S+)", str(error))
        lines = str(error).strip().splitlines() or [type(error).__name__]
        why = f"its pickle asks for {asked[1]}" if asked else lines[0][:200]
        raise ValueError(f"no file of tensors that can be read ({why})") from error
    tensors = _tensors(content)
    if any(name.startswith("vision_model.") for name in tensors):
        config = _config(path.with_name("config.json"))
        activation = (config.get("vision_config") or {}).get("hidden_act", "quick_gelu")
        quick_gelu = activation == "quick_gelu" if config else None
        return Weights(_from_transformers(tensors), quick_gelu)
    config = _config(path.with_name("open_clip_config.json"))
    if "model_cfg" in config:
        quick_gelu = config["model_cfg"].get("quick_gelu", False)
    return Weights(tensors, quick_gelu, config.get("preprocess_cfg") or {})


def put_weights(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Load tensors into a model of open_clip as its own `load_checkpoint` does.

    Raises:
        RuntimeError: they are not this model's.
    """
    # OpenAI's are in half precision, in which positions cannot be interpolated on a CPU.
    whole = {name: t.float() if t.is_floating_point() else t for name, t in tensors.items()}
    state = convert_state_dict(model, whole)
    if "positional_embedding" in state and not hasattr(model, "positional_embedding"):
        state = convert_to_custom_text_state_dict(state)
    expected = model.state_dict()
    for name in ("logit_scale", "logit_bias"):  # [] or [1]
        if name in state and name in expected:
            state[name] = state[name].reshape(expected[name].shape)
    if "logit_bias" in expected:
        state.setdefault("logit_bias", torch.zeros_like(expected["logit_bias"]))
    position_ids = "text.transformer.embeddings.position_ids"
    if position_ids not in expected:
        state.pop(position_ids, None)
    resize_pos_embed(state, model)
    resize_text_pos_embed(state, model)
    model.load_state_dict(state)


def _is_torchscript(path: Path) -> bool:
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def _read_torchscript(path: Path) -> tuple[dict[str, Tensor], bool | None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is no longer developed
        module = torch.jit.load(path, map_location="cpu")
    tensors = module.state_dict()
    kinds = {part.original_name for part in module.modules()}
    of_openai = _NO_WEIGHTS[0] in tensors  # all of which were trained with QuickGELU
    quick_gelu = True if of_openai or "QuickGELU" in kinds else False if "GELU" in kinds else None
    weights = {k: t for k, t in tensors.items() if k.rpartition(".")[2] not in _NO_WEIGHTS}
    return weights, quick_gelu


def _read_pickle(path: Path) -> Any:
    try:
        classes = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:  # of a format before zip archives, or broken: reading it says so
        classes = []
    with torch.serialization.safe_globals([(Inert, name) for name in classes]):
        return torch.load(path, map_location="cpu", weights_only=True)


def _tensors(content: Any) -> dict[str, Tensor]:
    """The tensors by name, of a checkpoint those of its model, without what wrappers prefix."""
    for key in ("state_dict", "model_state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    values = content.values() if isinstance(content, Mapping) else [None]
    if not values or not all(isinstance(value, Tensor) for value in values):
        raise ValueError("it holds no tensors by name")
    tensors = dict(content)
    while prefix := next((p for p in _WRAPPERS if all(k.startswith(p) for k in tensors)), None):
        tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    return tensors


def _from_transformers(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """open_clip's names and layouts for those of transformers' `CLIPModel`."""
    found = {}
    for name, tensor in tensors.items():
        # A linear layer has the transpose of a matrix that is multiplied from the right.
        value = tensor.T if name.endswith("_projection.weight") else tensor
        for theirs, ours in _FROM_TRANSFORMERS.items():
            name = name.replace(theirs, ours)
        if not name.endswith(".position_ids"):
            found[name] = value
    for query in [name for name in found if ".self_attn.q_proj." in name]:
        parts = [query.replace("q_proj", f"{part}_proj") for part in "qkv"]
        if missing := [name for name in parts if name not in found]:
            raise ValueError(f"it lacks {missing[0]} of transformers' CLIPModel")
        together = torch.cat([found.pop(name) for name in parts])
        found[query.replace("self_attn.q_proj.", "attn.in_proj_")] = together
    return found


def _config(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}

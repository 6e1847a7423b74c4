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
from dataclasses import dataclass
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

from clipsae.clip.published import FILES

# What archives hold beside weights: OpenAI's the sizes, all of them the mask of what follows.
_SIZES = ("input_resolution", "context_length", "vocab_size")
_MASK = "attn_mask"
SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt", ".npz")
_PREFIXES = ("module.", "_orig_mod.", "model.")
_IN_BLOCKS = {
    "self_attn.out_proj": "attn.out_proj",
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}
_OF_TRANSFORMERS = {
    "logit_scale": "logit_scale",
    "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.final_layer_norm.weight": "ln_final.weight",
    "text_model.final_layer_norm.bias": "ln_final.bias",
    "text_projection.weight": "text_projection",
    "vision_model.embeddings.class_embedding": "visual.class_embedding",
    "vision_model.embeddings.patch_embedding.weight": "visual.conv1.weight",
    "vision_model.embeddings.position_embedding.weight": "visual.positional_embedding",
    "vision_model.pre_layrnorm.weight": "visual.ln_pre.weight",  # so it is spelled
    "vision_model.pre_layrnorm.bias": "visual.ln_pre.bias",
    "vision_model.post_layernorm.weight": "visual.ln_post.weight",
    "vision_model.post_layernorm.bias": "visual.ln_post.bias",
    "visual_projection.weight": "visual.proj",
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
        preprocess: how images are normalised, where a config beside the file says it.
    """

    tensors: dict[str, Tensor]
    quick_gelu: bool | None
    preprocess: dict[str, Any]


def file_in(path: Path) -> Path | None:
    """A file of weights by its path or that of its folder: a plain one, or a repository's in the
    cache of the Hugging Face Hub (`models--openai--clip-vit-base-patch16`); None: neither.

    Raises:
        ValueError: a folder without a file of weights, or with several.
    """
    if path.is_file():
        return path
    if not path.is_dir():
        return None
    folder = path
    if (path / "snapshots").is_dir():
        main = path / "refs" / "main"
        revisions = sorted((path / "snapshots").iterdir(), key=lambda r: r.stat().st_mtime)
        named = path / "snapshots" / (main.read_text().strip() if main.is_file() else "")
        folder = named if main.is_file() and named.is_dir() else (revisions or [path])[-1]
    for name in FILES:
        if (folder / name).is_file():
            return folder / name
    found = sorted(file for file in folder.iterdir() if file.suffix in SUFFIXES)
    if len(found) != 1:
        what = f"{len(found)} files of weights ({found[0].name}, ...)" if found else "no weights"
        raise ValueError(f"{path} holds {what}: expected {FILES[0]}, {FILES[3]} or {FILES[4]}")
    return found[0]


def read_weights(path: Path) -> Weights:
    """Read a file.

    Raises:
        ValueError: it cannot be read, or holds something else.
    """
    quick_gelu = None
    if path.suffix == ".safetensors":
        try:
            content: Any = load_file(path)
        except Exception as error:  # its reader has errors of its own, of several kinds
            raise ValueError(f"it is no whole safetensors file ({_line(error)})") from error
    elif _is_torchscript(path):
        content, quick_gelu = _read_torchscript(path)
    else:
        content = _read_pickle(path)
    tensors = _tensors(content)
    if any(name.startswith("vision_model.") for name in tensors):
        config = _config(path.with_name("config.json"))
        return Weights(_of_transformers(tensors), _quick_gelu_of_transformers(config), {})
    config = _config(path.with_name("open_clip_config.json"))
    if "model_cfg" in config:
        quick_gelu = config["model_cfg"].get("quick_gelu", False)
    return Weights(tensors, quick_gelu, config.get("preprocess_cfg") or {})


def put_weights(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Load tensors into a model of open_clip as its own `load_checkpoint` does.

    Raises:
        ValueError: they are not this model's.
    """
    # OpenAI's are in half precision, in which positions cannot be interpolated on a CPU.
    whole = {name: t.float() if t.is_floating_point() else t for name, t in tensors.items()}
    state = convert_state_dict(model, whole)
    if "positional_embedding" in state and not hasattr(model, "positional_embedding"):
        state = convert_to_custom_text_state_dict(state)
    own = model.state_dict()
    for name in ("logit_scale", "logit_bias"):
        if name in state and name in own:
            state[name] = state[name].reshape(own[name].shape)
    if "logit_bias" in own and "logit_bias" not in state:
        state["logit_bias"] = torch.zeros_like(own["logit_bias"])
    position_ids = "text.transformer.embeddings.position_ids"
    if position_ids not in own:
        state.pop(position_ids, None)
    resize_pos_embed(state, model)
    resize_text_pos_embed(state, model)
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(_mismatch(own, state)) from error


def _mismatch(own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> str:
    for name in own:
        if name in state and own[name].shape != state[name].shape:
            shapes = f"{list(state[name].shape)}, and not {list(own[name].shape)}"
            return f"{name} in it has shape {shapes}"
    missing = [name for name in own if name not in state]
    if missing:
        return f"it lacks {len(missing):,} of the model's tensors, such as {missing[0]}"
    more = [name for name in state if name not in own]
    return f"it has {len(more):,} tensors that the model has not, such as {more[0]}"


def _is_torchscript(path: Path) -> bool:
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def _read_torchscript(path: Path) -> tuple[dict[str, Tensor], bool | None]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # TorchScript is no longer developed
            module = torch.jit.load(path, map_location="cpu")
    except RuntimeError as error:
        raise ValueError(f"it is no whole TorchScript archive ({_line(error)})") from error
    tensors = module.state_dict()
    kinds = {part.original_name for part in module.modules()}
    of_openai = _SIZES[0] in tensors  # all of which were trained with QuickGELU
    quick_gelu = True if of_openai or "QuickGELU" in kinds else False if "GELU" in kinds else None
    others = (*_SIZES, _MASK)
    weights = {k: t for k, t in tensors.items() if k.rpartition(".")[2] not in others}
    return weights, quick_gelu


def _read_pickle(path: Path) -> Any:
    try:
        others = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:  # of a format before zip archives, or broken: the reader says it
        others = []
    try:
        with torch.serialization.safe_globals([(Inert, name) for name in others]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a hostile file can make the unpickler raise anything
        asked = re.search(r"GLOBAL (\S+)", str(error))
        why = f"its pickle asks for {asked[1]}" if asked else type(error).__name__
        raise ValueError(f"it is no file of tensors that can be read ({why})") from error


def _tensors(content: Any) -> dict[str, Tensor]:
    """The tensors by name, of a checkpoint those of its model, without what wrappers prefix."""
    for key in ("state_dict", "model_state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping) or not content:
        raise ValueError("it holds no tensors by name")
    tensors = dict(content)
    while prefix := next((p for p in _PREFIXES if all(k.startswith(p) for k in tensors)), None):
        tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    wrong = [name for name, tensor in tensors.items() if not isinstance(tensor, Tensor)]
    if wrong:
        raise ValueError(f"it holds no tensors by name: {wrong[0]} is none")
    return tensors


def _of_transformers(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """open_clip's names and layouts for those of transformers' `CLIPModel`."""
    found: dict[str, Tensor] = {}
    parts: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        inside = re.fullmatch(r"(text|vision)_model\.encoder\.layers\.(\d+)\.(.+)\.(\w+)", name)
        if name.endswith(".position_ids"):
            continue
        if inside is None:
            if name not in _OF_TRANSFORMERS:
                raise ValueError(f"{name} in it is no tensor of transformers' CLIPModel")
            # A linear layer has the transpose of a matrix that is multiplied from the right.
            projection = name.endswith("_projection.weight")
            found[_OF_TRANSFORMERS[name]] = tensor.T if projection else tensor
            continue
        tower, block, layer, kind = inside.groups()
        place = f"{'visual.' * (tower == 'vision')}transformer.resblocks.{block}."
        if layer in _IN_BLOCKS:
            found[f"{place}{_IN_BLOCKS[layer]}.{kind}"] = tensor
        else:
            parts.setdefault(f"{place}attn.in_proj_{kind}", {})[layer] = tensor
    for name, three in parts.items():
        expected = [f"self_attn.{part}_proj" for part in "qkv"]
        if set(three) != set(expected):
            raise ValueError(f"{', '.join(three)} in it are not what transformers' CLIPModel has")
        found[name] = torch.cat([three[part] for part in expected])
    return found


def _config(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _quick_gelu_of_transformers(config: Mapping[str, Any]) -> bool | None:
    if not config:
        return None
    vision = config.get("vision_config") or {}
    return vision.get("hidden_act", "quick_gelu") == "quick_gelu"


def _line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__

"""The container that PatchSAE and what grew out of it save: `{"cfg", "state_dict"}`, pickled.

`cfg` is an object of the training code's own config class; only its attributes are read. Source:
https://github.com/dynamical-inference/patchsae, https://github.com/qyj-bkjx/Sparsemax-SAE.
"""

from pathlib import Path
from typing import Any

from clipsae.interop import patchsae, sparsemax_release
from clipsae.interop.plain import Imported
from clipsae.interop.safely import Inert, Tensors, read_pickle

SUFFIXES = (".pt", ".pth", ".ckpt")

_CLASSES = tuple(
    f"{module}.{name}"
    for module in ("src.sae_training.config", "sae_training.config")
    for name in ("ViTSAERunnerConfig", "Config")
)
_OF_TOKENS = ("model_name", "block_layer", "module_name", "dataset_path", "class_token")


def read(path: Path) -> Imported:
    """Read one file: the paper's Sparsemax SAE if it holds `concept`, else PatchSAE's.

    Raises:
        FileNotFoundError, ValueError: none there, or neither of the two, or a hostile one.
    """
    held = read_pickle(path, _CLASSES)
    if not isinstance(held, dict) or "state_dict" not in held:
        raise ValueError(f"{path} holds no 'state_dict': expected a PatchSAE or Sparsemax release")
    cfg = _plain(held.get("cfg", held.get("config")))
    tensors = Tensors(path, held["state_dict"])
    reads = {name: cfg[name] for name in _OF_TOKENS if cfg.get(name) is not None}
    kind = sparsemax_release if "concept" in tensors else patchsae
    sae, lost = kind.convert(cfg, tensors)
    return Imported(sae, kind.NAME, reads, tuple(lost))


def _plain(cfg: Any) -> dict[str, Any]:
    """The config's plain values by name."""
    cfg = vars(cfg) if isinstance(cfg, Inert) else cfg
    if not isinstance(cfg, dict):
        return {}
    plain = str | int | float | bool
    return {str(name): value for name, value in cfg.items() if isinstance(value, plain)}

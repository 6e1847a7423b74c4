"""`precision=`: the arithmetic of matrix products.

|         | products of the SAE                                | the CLIP's prefix |
|---------|----------------------------------------------------|-------------------|
| float32 | float32                                            | float32           |
| tf32    | TF32 on CUDA, float32 elsewhere                    | bf16 autocast     |
| bf16    | bf16 autocast while it is trained, then as in tf32 | bf16 autocast     |

Weights, Adam's moments, thresholds, losses and statistics are float32 or float64 in all of them.
The CLIP's tail and text tower compute in float32, or in TF32 where the SAE's products may.
"""

import logging
from collections.abc import Callable

import torch
from omegaconf import DictConfig

from clipsae.clip import FrozenCLIP
from clipsae.rules import PRECISIONS
from clipsae.store import Stage

log = logging.getLogger(__name__)


def resolve(cfg: DictConfig, stage: Callable[[], Stage]) -> Stage:
    """Replace `precision=auto` by a value, in place; any other is left alone.

    It is that of the finished work, wherever it was made: results are found from a login node, too.
    Otherwise it is the device's: tf32 on a GPU that has it, else float32. Without such a GPU,
    work that one has begun is found, too.

    Args:
        stage: the place in the store of what is looked for, by the config as it is then.

    Returns:
        That place.
    """
    if cfg.precision != "auto":
        return stage()
    own = of_device(cfg)
    places = {}
    for value in sorted(PRECISIONS, key=lambda value: value != own):  # its own first
        cfg.precision = value
        places[value] = stage()
    found = [value for value, place in places.items() if place.finished]
    if not found and own == "float32":
        found = [value for value, place in places.items() if place.partial.exists()]
    cfg.precision = found[0] if found else own
    if cfg.precision != own:
        log.info("precision=auto is %s, that of %s", cfg.precision, places[cfg.precision].path)
    return places[cfg.precision]


def of_device(cfg: DictConfig) -> str:
    """The value that suits the device."""
    return "tf32" if _has_tf32() and cfg.trainer.accelerator != "cpu" else "float32"


def apply(cfg: DictConfig, clip: FrozenCLIP) -> None:
    """Make PyTorch and the CLIP compute as `cfg.precision` says, until the next call.

    What is trained runs under Lightning's own autocast, see `of_lightning`.
    """
    clip.precision = of_clip(cfg)
    if torch.cuda.is_available():
        tf32 = cfg.precision != "float32" and _has_tf32()
        # Not by `fp32_precision`: Lightning asks for the older setting, and PyTorch refuses a mix.
        torch.set_float32_matmul_precision("high" if tf32 else "highest")
        torch.backends.cudnn.allow_tf32 = tf32


def of_clip(cfg: DictConfig) -> str:
    """The CLIP's precision, as `FrozenCLIP` and the keys of the store call it."""
    return PRECISIONS[cfg.precision][0]


def of_training(cfg: DictConfig) -> str:
    """The training's, as the keys of the store call it."""
    return PRECISIONS[cfg.precision][1]


def of_lightning(cfg: DictConfig) -> str:
    """The training's, as Lightning's Trainer calls it, to which TF32 is float32."""
    return "bf16-mixed" if cfg.precision == "bf16" else "32-true"


def described(cfg: DictConfig) -> str:
    """What is computed how, in a line."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    if cfg.precision == "float32":
        return f"precision float32: everything in float32 ({device})"
    products = "TF32" if _has_tf32() else "float32, as there is no TF32 here"
    if cfg.precision == "bf16":
        products = f"bf16 autocast in training, otherwise {products}"
    return (
        f"precision {cfg.precision}: SAE products in {products}; CLIP in bf16 autocast; "
        f"weights, thresholds and Adam in float32 ({device})"
    )


def _has_tf32() -> bool:
    """Whether there is a GPU with TF32 and bfloat16: NVIDIA's since Ampere."""
    return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)

"""The built-in model: a small CLIP trained on the scenes of `clipsae.data.scenes`.

`register()` makes open_clip know it under the name `clipsae-tiny`; its weights are made by
`python run.py task=pretrain`.
"""

from __future__ import annotations

import json
from pathlib import Path

import open_clip

NAME = "clipsae-tiny"
_HERE = Path(__file__).parent
_CONFIG = _HERE / f"{NAME}.json"


def bpe_path() -> Path:
    """The tokenizer's merges: those of CLIP's own that the scenes' words need."""
    return _HERE / "bpe.txt.gz"


def weights_path() -> Path:
    """The trained weights, float16 safetensors."""
    return _HERE / "weights.safetensors"


def register() -> str:
    """Make the model known to open_clip, any number of times, and return its name.

    open_clip reads configs from files; the merges' path depends on where the package lies, so
    that the config is completed here rather than passed to `open_clip.add_model_config` as it is.
    """
    config = json.loads(_CONFIG.read_text())
    config["text_cfg"]["tokenizer_kwargs"] = {"bpe_path": str(bpe_path())}
    open_clip.factory._MODEL_CONFIGS[NAME] = config
    return NAME

"""The built-in model: a small CLIP trained on the scenes of `clipsae.data.scenes`.

A plain ViT of open_clip (64 pixels, patch 8, 4 blocks of width 128), a text tower of 2 blocks,
1.37 M parameters. `register()` makes open_clip know it under the name `clipsae-tiny`.

The weights are those of `python -m clipsae.pretraining` (seed 0, 2,000 steps of 256 scenes; some
40 minutes on one core). Zero-shot accuracy in percent on 4,000 held-out scenes of each kind, with
open_clip's own classifier: shape 99.8, colour 100.0, pattern 99.75, size 100.0, shape_colour
99.7, position 100.0, background 100.0, count 99.98. What they owe to supervision: the losses take
the classes' prompts of every kind from the scenes' ground truth, and for as long as
`patch_steps`, with falling weight, patches too are trained to name the shape, colour and
pattern of the object that covers them.
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

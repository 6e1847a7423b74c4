"""clipscope's checkpoints: one pickle with k, the sizes and a `model_state_dict`.

The package clipscope (the SAEs of lewington/CLIP-ViT-L-scope): z = the k largest of
(x - pre_b) enc, x_hat = z dec + pre_b; enc is [d, M], dec [M, d].
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from clipsae.interop.files import Config, Tensors, names
from clipsae.interop.plain import NEGATIVE_LOST, Imported, Plain

NAME = "clipscope"

_UNUSED = names("optimizer_state_dict scheduler_state_dict epoch step")


def holds(content: Mapping[str, Any]) -> bool:
    """Whether a file's content is one of these."""
    return {"model_state_dict", "n_features", "d_in"} <= set(content)


def convert(content: Mapping[str, Any], path: Path) -> Imported:
    """From what a file holds.

    Raises:
        ValueError: no k; an entry or a tensor that is not understood, or does not fit.
    """
    file = Config(content, path)
    tensors = Tensors(file.get("model_state_dict"), path)
    parts = tensors.linear("enc.T", None, "dec", "pre_b")
    plain = Plain("topk", **parts, k=file.whole("k"))
    for name, size in (("d_in", plain.d), ("n_features", plain.latents)):
        file.check_size(name, size)
    return plain.imported(NAME, file, tensors, unused=_UNUSED, lost=[NEGATIVE_LOST])

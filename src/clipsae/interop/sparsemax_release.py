"""The checkpoints of the Sparsemax SAE's authors (arXiv 2604.14925, CVPR 2026).

https://github.com/qyj-bkjx/Sparsemax-SAE: `concept` [M, d] is C, `k` [d, d] is W_K and `v` [d, d]
is W_V, all multiplied from the right; the query is x / ||x||, the scale is 1, and codes are the
scores on the support of their sparsemax.
"""

from typing import Any

from clipsae.interop.known import PATCHSAE, refuse_others
from clipsae.interop.plain import Imported, assemble
from clipsae.interop.safely import Tensors

NAME = "Sparsemax SAE's release"

_OF_TOKENS = ("model_name", "block_layer", "module_name", "dataset_path", "class_token")
# Parameters of the code it grew out of, which its forward pass never reads.
_UNUSED = ("W_enc", "b_enc", "W_dec", "b_dec", "r_mag", "b_mag", "log_threshold")


def convert(cfg: dict[str, Any], tensors: Tensors) -> Imported:
    """From its config and tensors.

    Raises:
        ValueError: an option that is not its training's; tensors that are missing or too many, do
            not fit, or hold NaN.
    """
    refuse_others(cfg, (*PATCHSAE, "d_in", "d_sae"), {"gated_sae": (False,)}, tensors.where)
    latents, d = tensors.shape("concept", 2)
    sae = assemble(
        {
            "d": d,
            "latents": latents,
            "architecture": "attention",
            "activation": "sparsemax",
            "normalize_input": True,
            "reconstruction_weight": 10.0,
            "query": "identity",
            "scale": 1.0,
            "weights": "scores",
            "max_activation_frequency": 0.1,
        },
        {
            "architecture.C": tensors.take("concept", latents, d),
            "architecture.W_K": tensors.take("k", d, d),
            "architecture.W_V": tensors.take("v", d, d),
        },
    )
    lost = [
        "The release also suppresses latents that were active on more than 10 % of the tokens seen "
        "since it was started; it does not save which, so that its codes depend on the order of "
        "the images, and here none is suppressed."
    ]
    unused = [name for name in _UNUSED if name in tensors]
    tensors.drop(*unused)
    if unused:
        lost.append(f"{', '.join(unused)} are in the file, but its code never reads them.")
    tensors.refuse_others()
    reads = {name: cfg[name] for name in _OF_TOKENS if cfg.get(name) is not None}
    return Imported(sae, NAME, reads, tuple(lost))

"""The checkpoints of the Sparsemax SAE's authors (arXiv 2604.14925, CVPR 2026).

https://github.com/qyj-bkjx/Sparsemax-SAE: `concept` [M, d] is C, `k` [d, d] is W_K and `v` [d, d]
is W_V, all multiplied from the right; the query is x / ||x||, the scale is 1, and codes are the
scores on the support of their sparsemax.
"""

from typing import Any

from clipsae.interop.plain import assemble
from clipsae.interop.safely import Tensors
from clipsae.sae import SAE

NAME = "Sparsemax SAE's release"

# Parameters of the code it grew out of, which its forward pass never reads.
_UNUSED = ("W_enc", "b_enc", "W_dec", "b_dec", "r_mag", "b_mag", "log_threshold")


def convert(cfg: dict[str, Any], tensors: Tensors) -> tuple[SAE, list[str]]:
    """The SAE, and what could not be carried over.

    Raises:
        ValueError: tensors that are missing, do not fit, or hold NaN.
    """
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
    if left := tensors.left():
        lost.append(f"{', '.join(left)} are in the file, and not known here.")
    return sae, lost

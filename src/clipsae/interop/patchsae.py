"""PatchSAE's checkpoints (Lim et al., ICLR 2025).

https://github.com/dynamical-inference/patchsae: z = relu((x - b_dec) W_enc + b_enc), x_hat =
z W_dec + b_dec, with W_enc [d, M] and W_dec [M, d]. Its evaluation adds a constant of 0.105 to
every element of x_hat, which is no part of the SAE.
"""

from typing import Any

from clipsae.interop.plain import Plain
from clipsae.interop.safely import Tensors
from clipsae.sae import SAE

NAME = "PatchSAE"


def convert(cfg: dict[str, Any], tensors: Tensors) -> tuple[SAE, list[str]]:
    """The SAE, and what could not be carried over.

    Raises:
        ValueError: a gated one, whose forward pass PatchSAE never wrote; tensors that are missing,
            do not fit, or hold NaN.
    """
    if cfg.get("gated_sae"):
        raise ValueError(
            f"{tensors.where}: gated_sae=True: PatchSAE has parameters for it, and no forward pass"
        )
    d, latents = tensors.shape("W_enc", 2)
    plain = Plain(
        "relu",
        W_enc=tensors.take("W_enc", d, latents).T,
        W_dec=tensors.take("W_dec", latents, d),
        b_enc=tensors.take("b_enc", latents),
        b_dec=tensors.take("b_dec", d),
    )
    lost = []
    if left := tensors.left():
        lost.append(f"{', '.join(left)} are in the file, and not known here.")
    return plain.to_sae(), lost

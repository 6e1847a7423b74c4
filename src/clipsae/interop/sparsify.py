"""EleutherAI's sparsify: `cfg.json` and `sae.safetensors`.

https://github.com/EleutherAI/sparsify: z = the k largest of relu((x - b_dec) W^T + b), x_hat =
z W_dec + b_dec, with a row per latent in both matrices.
"""

from pathlib import Path

from clipsae.interop.known import SPARSIFY, refuse_others
from clipsae.interop.plain import Imported, Plain
from clipsae.interop.safely import Tensors, read_config, read_safetensors, same_size, size

NAME = "sparsify"
WEIGHTS = "sae.safetensors"

_READ = ("d_in", "num_latents", "k")
_HARMLESS = {
    "activation": ("topk",),
    "signed": (False,),
    "transcode": (False,),
    "skip_connection": (False,),
    "embed_skip": (False,),
    "gram_lookup": (False,),
}


def read(folder: Path) -> Imported:
    """Read a folder.

    Raises:
        FileNotFoundError, ValueError: a file is missing or damaged; a transcoder, a skip
            connection or another activation, which have no counterpart here.
    """
    about = folder / "cfg.json"
    cfg = read_config(about)
    refuse_others(cfg, (*SPARSIFY, *_READ), _HARMLESS, about)
    tensors = Tensors(folder / WEIGHTS, read_safetensors(folder / WEIGHTS))
    m, d = tensors.shape("encoder.weight", 2)
    same_size(cfg, "d_in", d, about)
    if cfg.get("num_latents"):  # 0: expansion_factor times d
        same_size(cfg, "num_latents", m, about)
    plain = Plain(
        "topk",
        W_enc=tensors.take("encoder.weight", m, d),
        W_dec=tensors.take("W_dec", m, d),
        b_enc=tensors.take("encoder.bias", m),
        b_dec=tensors.take("b_dec", d),
        k=size(cfg, "k", about),
    )
    tensors.refuse_others()
    return Imported(plain.to_sae(), NAME)

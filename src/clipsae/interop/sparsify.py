"""EleutherAI's sparsify: `cfg.json` and `sae.safetensors`.

https://github.com/EleutherAI/sparsify: z = the k largest of relu((x - b_dec) W^T + b), x_hat =
z W_dec + b_dec, with a row per latent in both matrices.
"""

from pathlib import Path

from clipsae.interop.files import Config, Tensors, names, read_config, read_weights
from clipsae.interop.plain import Imported, Plain

WEIGHTS = "sae.safetensors"

# Options without effect on the codes (multi_topk is the loss's), and those without one at a value.
_UNUSED = names("expansion_factor gram_table_hash lookup_max_order multi_topk normalize_decoder")
_ONLY = {"activation": ("topk",)} | dict.fromkeys(
    ("signed", "transcode", "skip_connection", "embed_skip", "gram_lookup"), (False,)
)


def read(folder: Path) -> Imported:
    """Read a folder.

    Raises:
        FileNotFoundError, ValueError: a file is missing or damaged; a transcoder, a skip
            connection or another activation, which have no counterpart here.
    """
    config = Config(read_config(folder / "cfg.json"), folder / "cfg.json")
    tensors = Tensors(read_weights(folder / WEIGHTS), folder / WEIGHTS)
    parts = tensors.linear("encoder.weight", "encoder.bias", "W_dec", "b_dec")
    plain = Plain("topk", **parts, k=config.whole("k"))
    config.check_size("d_in", plain.d)
    if config.get("num_latents"):  # 0: expansion_factor times d
        config.check_size("num_latents", plain.latents)
    return plain.imported("sparsify", config, tensors, unused=_UNUSED, only=_ONLY)

"""Ablate and steer: set codes of an image, and see how CLIP's predictions move.

T tokens of an image, d width, M latents, C classes.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from clipsae.clip import FrozenCLIP


@torch.no_grad()
def steered_logits(
    clip: FrozenCLIP,
    sae: nn.Module,
    image: Tensor,
    strengths: Mapping[int, float],
    classifier: Tensor,
) -> Tensor:
    """CLIP's logits [C] when the codes of some latents are set, on every token.

    All else in the stream stays as it is, what the SAE does not reconstruct included: without any
    strengths these are CLIP's own logits.

    Args:
        sae: in eval mode, on the device of `clip`.
        image: uint8 [3, S, S].
        strengths: latent -> its code; 0 switches it off.
        classifier: text embeddings [C, e], on that device.

    Raises:
        ValueError: a latent that does not exist.
    """
    wrong = [m for m in strengths if not 0 <= m < sae.config["latents"]]
    if wrong:
        raise ValueError(f"latent {wrong[0]}: expected 0 to {sae.config['latents'] - 1}")
    stream = clip.prefix(clip.normalize(image[None]))[0]
    if strengths:
        latents = torch.tensor(list(strengths), device=stream.device)
        wanted = torch.tensor(list(strengths.values()), dtype=stream.dtype, device=stream.device)
        change = wanted - sae.encode(stream)[:, latents]
        stream = stream + (change @ sae.decoder_rows(latents)) * sae.input_scale(stream)
    return clip.logits(stream[None], classifier)[0]

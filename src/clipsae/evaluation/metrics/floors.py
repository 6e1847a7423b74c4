"""What an SAE is compared with: an untrained one of the same config.

M latents, d width.
"""

import torch
from torch import Tensor

from clipsae.sae import SAE

INITIAL_IMAGES = 32  # that an untrained SAE is initialised from, as training does


def untrained(sae: SAE, images: Tensor, seed: int = 0) -> SAE:
    """An SAE of the same config before its first step of training, in eval mode.

    Args:
        images: tokens [N, T, d]; it is initialised from the first 32, as training does.
        seed: of its weights; the global generator of random numbers is left as it is.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        twin = SAE(**sae.config)
    twin.to(images.device).initialize(images[:INITIAL_IMAGES])
    return twin.eval()

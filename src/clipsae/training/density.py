"""SAEs that are as sparse as trained ones, to be timed without a training."""

import torch
from torch import Tensor

from clipsae.sae import SAE


@torch.no_grad()
def set_density(sae: SAE, x: Tensor, share: float) -> None:
    """Move biases or scales until this share of the latents is active, as after a training. An SAE
    with k active latents is left as it is.

    Args:
        x: tokens [..., d].
    """
    tokens = x.flatten(0, -2)
    sample = tokens[:: max(1, len(tokens) // 64)][:64]
    kept = max(1, int(share * sae.latents * len(sample)))

    def border() -> Tensor:  # between two scores: rounding does not decide on either
        return sae.scores(sample).flatten().topk(kept + 1).values[-2:].mean()

    activation, architecture = sae.activation, sae.architecture
    if hasattr(activation, "k") or hasattr(architecture, "k"):
        return
    if hasattr(activation, "b_gate"):
        activation.b_gate.sub_(border())
        activation.b_mag.sub_(border())
    elif hasattr(activation, "theta"):
        activation.theta.fill_(border().clamp(min=0))
    elif hasattr(activation, "weights"):  # smaller scores have a larger support
        matrix = architecture.W_K if hasattr(architecture, "W_K") else architecture.W_enc
        start, low, high = matrix.clone(), -9.0, 9.0
        for _ in range(25):
            middle = (low + high) / 2
            matrix.copy_(start * 2**middle)
            scores = sae.scores(sample)
            active = (scores > sae.threshold(scores)).float().mean()
            low, high = (middle, high) if active > share else (low, middle)
    elif hasattr(architecture, "b_enc"):
        architecture.b_enc.sub_(border())
    else:
        # No bias: move the dictionary against the mean direction of the tokens.
        mean = torch.nn.functional.normalize(tokens.mean(dim=0), dim=0)
        toward = architecture.query(mean[None])[0]
        start, low, high = architecture.C.clone(), 0.0, 64.0
        for _ in range(25):
            middle = (low + high) / 2
            architecture.C.copy_(start - middle * start.std() * toward / toward.norm())
            active = (sae.scores(sample) > 0).float().mean()
            low, high = (middle, high) if active > share else (low, middle)

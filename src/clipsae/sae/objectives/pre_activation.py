"""A loss that pulls the scores of dead latents up to their thresholds.

Conerly et al., "Circuits Updates - January 2025" (transformer-circuits.pub/2025/january-update),
for JumpReLU; in the form of SAELens, of the dead latents alone. With the scores s_m of a token, the
thresholds tau_m that a score must be above to be a code, and the rows w_m of the decoder:

    L = mean over tokens of sum_{m dead} relu(tau_m - s_m) ||w_m||

A dead latent has no other gradient: its score rises on the mean token, and its threshold falls, by
about the learning rate in each step of Adam until it is active somewhere.

N tokens, d width, M latents, n dead ones.
"""

import torch
from torch import Tensor

from clipsae.sae.base import Activation, Architecture, LossInputs, Objective, per_latent
from clipsae.sae.checks import not_negative
from clipsae.sae.dense import at_least_float32
from clipsae.sae.registry import OBJECTIVES


@OBJECTIVES.register("pre_activation")
class PreActivation(Objective):
    """weight * mean over tokens of the sum over dead latents of relu(tau - s) ||w||.

    A step costs products of the tokens with the dead latents alone. On a GPU it waits for which of
    them are dead.

    Args:
        latents: M.
        pre_activation: weight of the loss, which is in units of the scores. Adam's steps hardly
            depend on it where it is the only gradient: it must be well above its epsilon of 1e-8.
    """

    def __init__(self, latents: int, *, pre_activation: float = 0.0) -> None:
        super().__init__()
        not_negative("pre_activation", pre_activation)
        self.weight = pre_activation

    def check(self, architecture: Architecture, activation: Activation) -> None:
        if not architecture.scores_all:
            raise ValueError(
                f"pre_activation={self.weight} does nothing with an architecture whose silent "
                "latents have no score: set it to 0"
            )
        if not activation.own_thresholds:
            raise ValueError(
                f"pre_activation={self.weight}: this activation has no threshold of a latent's own "
                "that a score could rise to: set it to 0 and auxk above 0, or use activation=relu, "
                "gated or jumprelu"
            )

    def losses(self, inputs: LossInputs) -> dict[str, Tensor]:
        dead = inputs.dead.nonzero()[:, 0]
        scores = inputs.architecture.scores(inputs.encoded, dead)
        tau = per_latent(inputs.activation.threshold(scores), len(inputs.dead), dead)
        below = torch.relu(at_least_float32(tau - scores)).sum(dim=0)
        if not inputs.architecture.unit_rows:
            rows = at_least_float32(inputs.architecture.decoder_rows(dead))
            below = below * torch.linalg.vector_norm(rows, dim=-1)
        return {"pre_activation": self.weight * below.sum() / inputs.tokens}

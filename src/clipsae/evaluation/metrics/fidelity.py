"""Fidelity: which share of CLIP's accuracy above chance survives the reconstruction.

    (accuracy - chance) / (no_sae - chance)

1: nothing is lost; 0: what is left is guessing. Unlike the ratio of accuracies it can be compared
between datasets with different numbers of classes.
"""

import math


def fidelity(accuracy: float, no_sae: float, chance: float) -> float:
    """Share of the accuracy above chance that is kept.

    Args:
        accuracy: with the reconstruction (`on_M`, or with some latents only), in percent.
        no_sae: CLIP's own, in percent.
        chance: of guessing, in percent: 100 / classes.

    Returns:
        Also below 0 or above 1; NaN where CLIP itself does no better than chance.

    Raises:
        ValueError: an accuracy or chance outside 0..100.
    """
    for name, value in (("accuracy", accuracy), ("no_sae", no_sae), ("chance", chance)):
        if not (0 <= value <= 100 or math.isnan(value)):
            raise ValueError(f"{name}={value}: expected percent, 0..100")
    return (accuracy - chance) / (no_sae - chance) if no_sae > chance else math.nan

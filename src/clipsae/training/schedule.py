"""Learning-rate schedules, as factors of the base rate."""

import math
from collections.abc import Callable
from typing import Literal

from clipsae.sae.checks import one_of, whole

Decay = Literal["constant", "cosine", "linear"]


def warmup_then(decay: Decay, warmup_steps: int, max_steps: int) -> Callable[[int], float]:
    """Linear warm-up from 1/warmup_steps to 1, then `decay` down to 0 at `max_steps`.

    Args:
        decay: "constant" (the released code's), "cosine" or "linear".
        warmup_steps: steps of the warm-up; 0 for none.
        max_steps: the length of the training; only read where the rate decays. One that ends
            within the warm-up has no decay.

    Returns:
        step -> factor in [0, 1].

    Raises:
        ValueError: an unknown decay, a negative warm-up, or a decay without an end.
    """
    one_of("decay", decay, ("constant", "cosine", "linear"))
    whole("warmup_steps", warmup_steps, least=0)
    if decay != "constant" and max_steps < 0:
        raise ValueError(f"decay={decay!r} needs a trainer.max_steps, got {max_steps}")

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        if decay == "constant":
            return 1.0
        done = min((step - warmup_steps) / (max_steps - warmup_steps), 1.0)
        return 1.0 - done if decay == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))

    return factor

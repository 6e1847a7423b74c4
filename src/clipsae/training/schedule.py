"""Schedules: the learning rate and the sparsity penalties, as factors of what is set."""

import math
from collections.abc import Callable
from typing import Literal

from clipsae.sae.checks import fraction, one_of, whole

Decay = Literal["constant", "cosine", "linear"]


def warmup_then(
    decay: Decay, warmup_steps: int, max_steps: int, decay_fraction: float = 1.0
) -> Callable[[int], float]:
    """Linear warm-up from 1/warmup_steps to 1, then 1, then `decay` down to 0 at `max_steps`.

    Args:
        decay: "constant" (the released code's), "cosine" or "linear".
        warmup_steps: steps of the warm-up; 0 for none.
        max_steps: the length of the training; only read where the rate decays. One that ends
            within the warm-up has no decay.
        decay_fraction: the share of the steps, at the end, over which the rate decays; above 0, up
            to 1. dictionary_learning and SAELens have 0.2. 1: from the end of the warm-up. Only
            read where the rate decays.

    Returns:
        step -> factor in [0, 1].

    Raises:
        ValueError: an unknown decay, a negative warm-up, a share that is none, or a decay without
            an end.
    """
    one_of("decay", decay, ("constant", "cosine", "linear"))
    whole("warmup_steps", warmup_steps, least=0)
    fraction("decay_fraction", decay_fraction, "a number above 0, up to 1", zero=False, one=True)
    if decay != "constant" and max_steps < 0:
        raise ValueError(f"decay={decay!r} needs a trainer.max_steps, got {max_steps}")

    start = max(warmup_steps, round((1 - decay_fraction) * max_steps))

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        if decay == "constant" or step < start:
            return 1.0
        done = min((step - start) / max(max_steps - start, 1), 1.0)
        return 1.0 - done if decay == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))

    return factor


def penalty_warmup(sparsity_warmup_steps: int, step: int) -> float:
    """What the sparsity penalties are multiplied by in a step: linear from 0 to 1, as in
    dictionary_learning (`sparsity_warmup_steps`) and SAELens (`l1_warm_up_steps`).

    Args:
        sparsity_warmup_steps: the first step with factor 1; 0 for none.
        step: optimizer steps taken before it.
    """
    return min(step / sparsity_warmup_steps, 1.0) if sparsity_warmup_steps else 1.0

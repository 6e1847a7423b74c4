"""The one switch between dense and sparse products."""

from math import log

import torch
from torch import Tensor

DENSE_FROM: dict[str, dict[int, float]] = {
    "cpu": {512: 0.12, 6304: 0.14},
    "cuda": {512: 0.006, 6304: 0.006},
}
"""Share of active pairs above which dense products are faster, by type of device and number of
tokens; between them by the logarithm. Devices that are not named always have dense ones.

CPU: measured on whole steps of 512 tokens, M = 49,152, with one thread: a ReLU SAE takes 1.1 s at
3 %, 2.3 at 10 %, 2.6 at 15 % and 3.6 at 20 %, in dense products 2.8. With two threads both are
equal at 14 %. (Sparsemax, whose threshold takes passes over all M where many act: 4.7 s at 16 %,
dense 7.6.) Of 6,304 tokens, ReLU steps in dense products take 1.51 times as long at 9 %, 1.16 times
at 13 %.

CUDA: not measured, but reckoned for an H100 and d = 768: a pair moves some 15 kB through its memory
in a step, at 2.5 TB/s 6 ns; the dense products and passes that it saves take 10 ms.
"""


def dense_from(device: torch.device, tokens: int) -> float:
    """The share of active pairs above which dense products are faster; 0: always."""
    (few, at_few), (many, at_many) = sorted(DENSE_FROM.get(device.type, {1: 0.0, 2: 0.0}).items())
    between = log(max(tokens, 1) / few) / log(many / few)
    return at_few + min(max(between, 0.0), 1.0) * (at_many - at_few)


def prefers_dense(like: Tensor, active: int | None = None) -> bool:
    """Whether to use dense products.

    Args:
        like: scores [N, M], or without `active` any tensor on the device.
        active: how many of the pairs have a code. None: whether sparse codes are never used here.
    """
    if active is None:
        return torch.compiler.is_compiling() or like.device.type not in DENSE_FROM
    return active > most_pairs(like, len(like), like.shape[-1])


def most_pairs(like: Tensor, tokens: int, latents: int) -> int:
    """Pairs above which dense products are faster on a tensor's device."""
    return int(dense_from(like.device, tokens) * tokens * latents)

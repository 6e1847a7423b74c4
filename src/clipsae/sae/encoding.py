"""Encoding in evaluation that keeps codes sparse, where few latents act.

N tokens, d width, M latents.
"""

import torch
from torch import Tensor

from clipsae.sae.base import Activation
from clipsae.sae.memory import empty
from clipsae.sae.products import BLOCK, Dictionary
from clipsae.sae.support import Support, positions_above


@torch.no_grad()
def encode_by_blocks(
    query: Tensor, dictionary: Dictionary, activation: Activation
) -> tuple[Tensor, Support | None]:
    """`activation.gate` of the scores of a few tokens at a time, which stay in the cache.

    Args:
        query: [N, d], what the dictionary's scores are of.

    Returns:
        Codes [p] and their support, positions ascending; or codes [N, M] and None, where so many
        latents act that dense products are faster.
    """
    n, m = len(query), len(dictionary.keys)
    if not n:
        return query.new_empty(0, m), None
    values, places, buffer, dense = [], [], None, None
    for start in range(0, n, BLOCK):
        scores = buffer = dictionary.scores(query[start : start + BLOCK], buffer)
        tau = activation.threshold(scores)
        positions = positions_above(scores, tau) if dense is None else None
        if positions is not None:
            values.append(_codes(scores, tau, positions, activation))
            places.append(positions + start * m)
            continue
        if dense is None:
            dense = empty(n, m, like=scores)
            if start:
                dense[:start] = Support(torch.cat(places), start, m).dense(torch.cat(values))
        dense[start : start + BLOCK] = activation.gate(scores, tau)
    if dense is not None:
        return dense, None
    return torch.cat(values), Support(torch.cat(places), n, m)


def _codes(scores: Tensor, tau: Tensor, positions: Tensor, activation: Activation) -> Tensor:
    """Of scores [n, M] above tau, at positions token * M + latent: [p]."""
    m = scores.shape[1]
    chosen, latents = scores.flatten().index_select(0, positions), positions % m
    if tau.ndim == 2:
        tau = tau[:, 0].index_select(0, torch.div(positions, m, rounding_mode="floor"))
    elif tau.ndim == 1:
        tau = tau.index_select(0, latents)
    return activation.curve(chosen, tau, latents)

"""AuxK: dead latents learn to reconstruct what the living ones left over.

Gao et al., "Scaling and evaluating sparse autoencoders", 2024 (arXiv 2406.04093), in the form of
dictionary_learning (https://github.com/saprmarks/dictionary_learning). Ghost gradients are the
older remedy for the same ill; this one has replaced them.

N tokens, d width, M latents.
"""

import torch
from torch import Tensor

from clipsae.sae.base import Activation
from clipsae.sae.codes import SparseCodes
from clipsae.sae.dictionary import Dictionary
from clipsae.sae.distributed import summed
from clipsae.sae.losses import at_least_float32
from clipsae.sae.selection import largest_positions


def dead_codes(scores: Tensor, dead: Tensor, k: int) -> Tensor:
    """The k largest of a token's scores among the dead, at their places in zeros [N, M].

    Args:
        scores: [N, M], how strongly latents would act, >= 0.
        dead: BoolTensor [M]. Fewer than k: all of them.
    """
    # Without asking which are dead: on a GPU, the answer would have to be waited for.
    masked = scores.detach().masked_fill(~dead, -1)  # below all scores
    indices = masked.topk(min(k, dead.numel()), dim=-1, sorted=False).indices
    values = scores.gather(-1, indices) * dead[indices]
    return torch.zeros_like(scores).scatter(-1, indices, values)


def dead_codes_of(
    dictionary: Dictionary, query: Tensor, activation: Activation, dead: Tensor, k: int
) -> SparseCodes | None:
    """The same where a dictionary is known, from the scores of the dead latents alone; None where
    no latent is dead.

    Args:
        query: [N, d], what the dictionary's scores are products with.
    """
    latents = dead.nonzero()[:, 0]
    if not len(latents):
        return None

    def choose(scores: Tensor) -> Tensor:
        return largest_positions(activation.auxk_scores(scores), min(k, len(latents)))

    scores = dictionary.find(query, choose, latents=latents)
    assert isinstance(scores, SparseCodes)
    return scores.with_values(activation.auxk_scores(scores.values))


def auxk_loss(
    x: Tensor, reconstruction: Tensor, aux: Tensor, defined: Tensor, world_size: int = 1
) -> Tensor:
    """||e - aux||^2 / ||e - mean e||^2 with e = x - x_hat held fixed.

    Dictionary and encoder both receive gradients: without the encoder's, a dead latent would
    learn what to write and never when.

    Args:
        x, reconstruction: [N, d].
        aux: [N, d], what the dead latents decode to, without the bias.
        defined: whether there are dead latents. Where there is none, or e is the same for all
            tokens, the result is exactly 0.
        world_size: processes that the batch is spread over, in equal parts. The mean of their
            results, and so of their gradients, is then that of the whole batch.
    """
    error = at_least_float32((x - reconstruction).detach())
    left = (error - at_least_float32(aux)).square().sum()
    mean = summed(error.mean(dim=0), world_size) / world_size
    sizes = torch.stack([(error - mean).square().sum(), error.square().sum()])
    whole, size = summed(sizes, world_size) / world_size
    # A residual that is the same for all tokens leaves only rounding errors here.
    rounding = torch.finfo(error.dtype).eps * size
    defined = defined & (whole > rounding)
    return torch.where(defined, left / torch.where(defined, whole, 1), 0)

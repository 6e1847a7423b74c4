"""AuxK: dead latents learn to reconstruct what the living ones left over.

Gao et al., "Scaling and evaluating sparse autoencoders", 2024 (arXiv 2406.04093), in the form of
dictionary_learning (https://github.com/saprmarks/dictionary_learning). Ghost gradients are the
older remedy for the same ill; this one has replaced them.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from clipsae.sae.base import Architecture
from clipsae.sae.losses import at_least_float32
from clipsae.sae.ranks import summed
from clipsae.sae.support import largest


def auxk_loss(
    x: Tensor,
    reconstruction: Tensor,
    scale: Tensor,
    candidates: Tensor,
    dead: Tensor,
    k: int,
    architecture: Architecture,
    ranks: int = 1,
) -> Tensor:
    """||e - z~ W_dec||^2 / ||e - mean e||^2 with e = x - x_hat held fixed; 0 where undefined.

    Dictionary and encoder both receive gradients: without the encoder's, a dead latent would
    learn what to write and never when.

    Args:
        x, reconstruction: [..., d].
        scale: what decoded codes are multiplied with.
        candidates: [..., M], how strongly latents would act, >= 0.
        dead: BoolTensor [M].
        k: the largest candidates of a token among the dead that reconstruct; all if fewer.
        ranks: processes that the batch is spread over; see `leftover_loss`.

    Returns:
        A scalar; exactly 0 where no latent is dead.
    """
    candidates = candidates.flatten(0, -2)
    # Which are dead is not looked at: on a GPU, the answer would have to be waited for.
    masked = candidates.detach().masked_fill(~dead, -1)  # below all candidates
    indices = masked.topk(min(k, dead.numel()), dim=-1, sorted=False).indices
    values = candidates.gather(-1, indices) * dead[indices]
    aux = architecture.decode_chosen(values, indices)
    return leftover_loss(x, reconstruction, scale, aux, dead.any(), ranks)


def auxk_loss_at(
    x: Tensor,
    reconstruction: Tensor,
    scale: Tensor,
    query: Tensor,
    candidates: Callable[[Tensor], Tensor],
    dead: Tensor,
    k: int,
    architecture: Architecture,
    ranks: int = 1,
) -> Tensor:
    """The same where a dictionary is known, from the scores of the dead latents alone.

    Args:
        query: [N, d], what the dictionary's scores are of.
        candidates: (scores) -> how strongly latents would act.
    """
    of_dead = dead.nonzero()[:, 0]
    if not len(of_dead):
        return x.new_zeros((), dtype=at_least_float32(x[:0]).dtype)

    def choose(scores: Tensor) -> Tensor:
        n, m = scores.shape
        chosen = largest(candidates(scores), min(k, m))[1]
        return (chosen + m * torch.arange(n, device=x.device)[:, None]).flatten()

    dictionary = architecture.dictionary()
    assert dictionary is not None
    scores, support = dictionary.find(query, choose, latents=of_dead)
    aux = architecture.output(dictionary.mixed(candidates(scores), support))
    return leftover_loss(x, reconstruction, scale, aux, dead.new_ones(()), ranks)


def leftover_loss(
    x: Tensor,
    reconstruction: Tensor,
    scale: Tensor,
    aux: Tensor,
    defined: Tensor,
    ranks: int = 1,
) -> Tensor:
    """||e - aux||^2 / ||e - mean e||^2 with e = x - x_hat held fixed.

    Args:
        x, reconstruction: [..., d].
        aux: [N, d], without bias and scale.
        defined: BoolTensor; where it is False, or e is the same for all tokens, the result is 0.
        ranks: processes that the batch is spread over, in equal parts. The mean of their results,
            and so of their gradients, is then that of the whole batch.
    """
    error = at_least_float32((x - reconstruction).detach()).flatten(0, -2)
    scale = at_least_float32(scale)
    aux = at_least_float32(aux) * (scale.flatten(0, -2) if scale.ndim > 1 else scale)
    left = (error - aux).square().sum()
    mean = summed(error.mean(dim=0), ranks) / ranks
    sizes = torch.stack([(error - mean).square().sum(), error.square().sum()])
    whole, size = summed(sizes, ranks) / ranks
    # A residual that is the same for all tokens leaves only rounding errors here.
    rounding = torch.finfo(error.dtype).eps * size
    defined = defined & (whole > rounding)
    return torch.where(defined, left / torch.where(defined, whole, 1), 0)

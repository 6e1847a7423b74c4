"""The scale that all losses share, and AuxK.

Every variant's reconstruction loss is PatchSAE's: the mean over tokens and features of
(x_hat - x)^2 / ||x||. For a token of norm r and width d that is ||x_hat - x||^2 / (d r). Where a
source minimises something else, its weights are divided by what its first term differs in:

| source's first term, per token          | its tokens           | weight here = published times  |
|-----------------------------------------|----------------------|--------------------------------|
| mean (x_hat-x)^2 / ||x|| (PatchSAE)     | as they are          | 1                              |
| ||x - x_hat||^2                         | as they are          | 1 / (d r)                      |
| ||x - x_hat||^2                         | divided by r         | l1: 1 / d    l0, auxk: r / d   |
| ||x - x_hat||^2                         | times sqrt(d) / r    | l1: d^-3/2   l0: r / d^2       |
| ||x - x_hat||^2 / ||x - mean x||^2      | any (Gao et al.)     | auxk: r / d                    |

A term without a unit that is no penalty on codes (monosemanticity, orthogonality) converts as auxk
does; so does a norm that gradients are clipped at: it is that of the matrices' gradients, which are
those of the loss.

(r: typical norm of a token. With tokens divided by c the codes are divided by c too, so a sum of
codes gains a factor c and a number of latents c^2.) With `normalize: unit` the codes are those of
unit tokens, while the loss stays that of x: r then appears in the l1 row, too: l1: r / d.

With `normalize: mean_std` the loss is that of x, too, and the codes are those of tokens divided by
their deviation. With `normalize: whiten` it is the mean of ((x_hat - x) W)^2 / ||x||: errors count
as the whitened token has them, in directions of small variance as much as in others, and W is
scaled so that the mean token in place of all has about the same loss at any strength. So weights of
AuxK and of clipping that fit one of them fit the others (of l1: times the deviation).

AuxK: dead latents learn to reconstruct the residual. Gao et al., "Scaling and evaluating sparse
autoencoders", 2024 (arXiv 2406.04093), in the form of dictionary_learning
(https://github.com/saprmarks/dictionary_learning). It has replaced ghost gradients.
"""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from clipsae.sae.codes import SparseCodes
from clipsae.sae.dense import at_least_float32
from clipsae.sae.engine import backend
from clipsae.sae.engine.reference import Chosen
from clipsae.sae.sparse_ops import Dictionary, largest_positions


def relative_error(reconstruction: Tensor, x: Tensor, norm: Tensor | None = None) -> Tensor:
    """Mean over tokens and features of (x_hat - x)^2 / ||x||, a scalar; PatchSAE's loss.

    Args:
        reconstruction, x: [..., d]. Half precision is summed in float32.
        norm: [...], in place of ||x||.

    A token of norm 0 has no relative error: it counts as a token, with loss 0. No tokens: 0.
    """
    x = at_least_float32(x)
    errors = (at_least_float32(reconstruction) - x).square().mean(dim=-1)
    return relative(errors, torch.linalg.vector_norm(x, dim=-1) if norm is None else norm)


def relative(errors: Tensor, norm: Tensor) -> Tensor:
    """Mean over tokens of errors [...] / norm [...], a scalar; see `relative_error`."""
    errors = errors * (torch.where(norm > 0, norm, 1).reciprocal() * (norm > 0))
    return errors.mean() if errors.numel() else errors.sum()


def dead_codes(scores: Tensor, dead: Tensor, k: int) -> Tensor:
    """The k largest of a token's scores among the dead latents, zeros elsewhere: [N, M].

    Args:
        scores: [N, M], `Activation.auxk_scores`.
        dead: BoolTensor [M]. Fewer than k: all of them.
    """
    # Without asking which are dead: on a GPU, the answer would have to be waited for.
    masked = scores.detach().masked_fill(~dead, -torch.inf)
    indices = masked.topk(min(k, dead.numel()), dim=-1, sorted=False).indices
    values = scores.gather(-1, indices) * dead[indices]
    return torch.zeros_like(scores).scatter(-1, indices, values)


def sparse_dead_codes(
    dictionary: Dictionary,
    query: Tensor,
    auxk_scores: Callable[[Tensor], Tensor],
    dead: Tensor,
    k: int,
) -> SparseCodes | None:
    """The same from the scores of the dead latents alone; None where no latent is dead.

    On a GPU from the scores of all, as it is not asked which are dead; never None.

    Args:
        query: [N, d], the dictionary's input.
    """
    if not backend(query).waits:
        most = min(k, dead.numel())
        found = dictionary.find(
            query,
            lambda s: largest_positions(s, most, auxk_scores(s).masked_fill(~dead, -torch.inf)),
            wait=False,
        )
        assert isinstance(found, SparseCodes)
        return found.with_values(auxk_scores(found.values)) * dead
    latents = dead.nonzero()[:, 0]
    if not len(latents):
        return None

    def choose(scores: Tensor) -> Chosen:
        return largest_positions(scores, min(k, len(latents)), auxk_scores(scores))

    scores = dictionary.find(query, choose, latents=latents)
    assert isinstance(scores, SparseCodes)
    return scores.with_values(auxk_scores(scores.values))


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
        world_size: ranks that the batch is spread over, in equal parts. The mean of their results,
            and so of their gradients, is then that of the whole batch.
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


def summed(values: Tensor, world_size: int) -> Tensor:
    """The sum over all ranks, without gradient through the others' values."""
    if world_size > 1:
        values = values.clone()
        dist.all_reduce(values, dist.ReduceOp.SUM)
    return values

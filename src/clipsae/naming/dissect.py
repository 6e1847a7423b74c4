"""CLIP-Dissect: the words that fit what latents are most active on (Oikarinen and Weng, "CLIP-
Dissect: Automatic Description of Neuron Representations in Deep Vision Networks", ICLR 2023, arXiv
2204.10965).

Its similarity is the soft weighted pointwise mutual information (soft-WPMI). CLIP gives each
example a probability of each word, P = softmax_w(a cos(example, word)). The k-th strongest example
of a latent shows what the latent stands for with probability p_k, so that

    log p(D | w) = sum_k log(1 + p_k (P_kw - 1))
    soft-WPMI(w) = log p(D | w) - lambda log p(D),   log p(D) = log mean_m exp(log p(D_m | w)),

where the second term is how well the word fits all latents: words that fit everywhere are no names.

M latents, K examples of each, E examples in all, W words, e embedding size, m latents of a
block.
"""

from collections.abc import Callable, Iterator
from math import log

import torch
from torch import Tensor

from clipsae.evaluation.ranking import top_latents
from clipsae.sae.dense import without_tf32

# Of the released code: p_k falls from the first example's to the last one's in equal steps.
FIRST, LAST = 0.998, 0.97
SHARPNESS = 10.0  # a
_TINY = 1e-7  # the released code adds it to each p
_BLOCK_ELEMENTS = 2**22  # of float32 arrays [m, W]
_FACTORS = 10  # of 0.002 and more each: far from what float32 cannot hold


@torch.no_grad()
@without_tf32()
def soft_wpmi(
    examples: Tensor,
    index: Tensor,
    words: Tensor,
    n: int,
    *,
    sharpness: float = SHARPNESS,
    weight: float = 1.0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[Tensor, Tensor]:
    """The best n words of each latent.

    Never more than a block of latents is compared with all words at a time, so that memory does
    not depend on M; every block is computed twice, since the second term needs all of them.

    Args:
        examples: unit embeddings [E, e].
        index: LongTensor [M, K], each latent's examples, strongest first; -1 where it has fewer,
            which say nothing.
        words: unit embeddings [W, e].
        n: W at most.
        sharpness: a.
        weight: lambda; 0: how common a word is does not matter.
        progress: called with (latents done, 2 M).

    Returns:
        LongTensor [M, n] and float32 [M, n] in nats, best first, on the device of `examples`. For
        a latent without examples -1 and NaN.

    Raises:
        ValueError: `n` is not in 1..W.
    """
    if not 1 <= n <= len(words):
        raise ValueError(f"n={n}: expected 1 to {len(words)}, the number of words")
    latents = len(index)
    index, words = index.to(examples.device), words.to(examples.device)
    there = (index >= 0).any(dim=1)
    best = index.new_full((latents, n), -1)
    scores = examples.new_full((latents, n), torch.nan)
    if not there.any():  # a dictionary that is dead on these images
        return best, scores
    common = torch.full((len(words),), -torch.inf, dtype=torch.float64, device=examples.device)
    if weight:
        for rows, found in _log_likelihoods(examples, index, words, sharpness):
            of_block = found[there[rows]].double().logsumexp(dim=0)
            common = torch.logaddexp(common, of_block)
            progress(rows.stop, 2 * latents)
        common -= log(max(int(there.sum()), 1))
    common = weight * common if weight else torch.zeros_like(common)
    for rows, found in _log_likelihoods(examples, index, words, sharpness):
        found = found - common.float()
        top = top_latents(found, n)
        best[rows] = top.masked_fill(~there[rows, None], -1)
        scores[rows] = found.gather(1, top).masked_fill(~there[rows, None], torch.nan)
        progress(latents + rows.stop, 2 * latents)
    return best, scores


def _log_likelihoods(
    examples: Tensor, index: Tensor, words: Tensor, sharpness: float
) -> Iterator[tuple[slice, Tensor]]:
    """log p(D | w) of one block of latents after the other, float32 [m, W]."""
    latents, total = index.shape
    size = max(1, _BLOCK_ELEMENTS // len(words))
    for start in range(0, latents, size):
        rows = slice(start, min(start + size, latents))
        found = examples.new_zeros(rows.stop - start, len(words))
        product = torch.ones_like(found)
        for k, chosen in enumerate(index[rows].unbind(dim=1)):
            shown = FIRST - (FIRST - LAST) * k / total
            p = (sharpness * (examples[chosen.clamp(min=0)] @ words.T)).softmax(dim=-1)
            p = p.sub_(1).mul_(shown).add_(1 + _TINY)
            product.mul_(p.masked_fill_((chosen < 0)[:, None], 1))
            if (k + 1) % _FACTORS == 0 or k + 1 == total:  # a logarithm of several at once
                found += product.log_()
                product.fill_(1)
        yield rows, found

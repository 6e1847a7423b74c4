"""What an architecture and an activation owe an SAE, and what an SAE returns.

Letters: B images or tokens, T tokens of an image, d width, M latents, n latents kept.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from clipsae.sae.products import Dictionary
from clipsae.sae.support import Support, above


@dataclass(frozen=True)
class SparseCodes:
    """Codes [..., M] that are 0 but on a support.

    Attributes:
        values: [p].
        support: their places, for tokens in one row.
        shape: of the dense codes.
    """

    values: Tensor
    support: Support
    shape: tuple[int, ...]

    def dense(self) -> Tensor:
        """[..., M], differentiable."""
        return self.support.dense(self.values).view(self.shape)

    def fired(self) -> Tensor:
        """LongTensor [M]: how many tokens each latent is active on."""
        return self.support.count(self.values != 0)


def _fired(codes: Tensor) -> Tensor:
    codes = codes.flatten(0, -2)
    if codes.device.type != "cpu" or not len(codes):
        return (codes != 0).sum(dim=0)
    # A few tokens stay in the cache, and their number fits in a byte: int64 sums of booleans take
    # ten times as long.
    active = ((part != 0).view(torch.uint8) for part in codes.split(64))
    return sum(part.sum(dim=0, dtype=torch.uint8).long() for part in active)


@dataclass(frozen=True)
class SAEOutput:
    """What an SAE made of a batch.

    Attributes:
        reconstruction: [..., d], in the units of the input.
        held: codes [..., M], or in training the sparse form of them.
        losses: named terms, scalars, each already weighted. In eval mode the reconstruction only.
    """

    reconstruction: Tensor
    held: Tensor | SparseCodes
    losses: dict[str, Tensor]

    @property
    def codes(self) -> Tensor:
        """[..., M]. In training, where `held` is sparse, made at each call."""
        return self.held.dense() if isinstance(self.held, SparseCodes) else self.held

    def fired(self) -> Tensor:
        """LongTensor [M]: how many tokens each latent is active on."""
        return self.held.fired() if isinstance(self.held, SparseCodes) else _fired(self.held)

    @property
    def loss(self) -> Tensor:
        """The sum of the terms: what is minimised."""
        return torch.stack(list(self.losses.values())).sum()


class Architecture(nn.Module):
    """Maps tokens to scores and codes back to tokens; knows nothing of sparsity.

    A subclass's `__init__(self, d, latents, encoder_bias, *, ...)` declares its options as
    keyword-only arguments. `encoder_bias` is False where the activation brings its own.
    """

    unit_rows = False
    """Whether decoder rows are kept at unit norm: a penalty on codes then needs no norms."""

    def dictionary(self) -> Dictionary | None:
        """What training needs to touch the active latents alone, for inputs `query(x)`.

        None: only `scores` and `decode` are known, and all products are dense.
        """
        return None

    def query(self, x: Tensor) -> Tensor:
        """[..., d] -> [..., d]: what the dictionary's scores are of."""
        return x

    def output(self, mixed: Tensor, frozen: bool = False) -> Tensor:
        """Mixed rows of the dictionary [..., d] -> tokens [..., d], *without* the bias.

        Args:
            frozen: parameters receive no gradient.
        """
        return mixed

    def decode_at(self, codes: Tensor, support: Support | None, frozen: bool = False) -> Tensor:
        """`decode`, or `decode_frozen`, of codes [p] on a support, or [N, M]: [N, d]."""
        dictionary = self.dictionary()
        assert dictionary is not None
        out = self.output(dictionary.mixed(codes, support, frozen), frozen)
        if self.bias is None:
            return out
        return out + (self.bias.detach() if frozen else self.bias)

    def scores(self, x: Tensor, latents: Tensor | None = None) -> Tensor:
        """[..., d] -> [..., M], or [..., n] of `latents` ([n], or [B, n] for x [B, T, d])."""
        raise NotImplementedError

    def decode(self, codes: Tensor, latents: Tensor | None = None) -> Tensor:
        """[..., M] (or [..., n]) -> [..., d], the bias included."""
        raise NotImplementedError

    def decode_chosen(self, values: Tensor, indices: Tensor) -> Tensor:
        """Decode few latents, different ones for each token, *without* the bias.

        Args:
            values: [tokens, n].
            indices: LongTensor [tokens, n].

        Returns:
            [tokens, d].
        """
        raise NotImplementedError

    def decode_frozen(self, codes: Tensor) -> Tensor:
        """`decode` whose parameters receive no gradient; the codes do."""
        raise NotImplementedError

    def decoder_rows(self, latents: Tensor | None = None) -> Tensor:
        """What a latent adds to the reconstruction: [M, d], or those of `latents`."""
        raise NotImplementedError

    def decoder_norms(self) -> Tensor:
        """The norm of each of `decoder_rows`: [M]."""
        return torch.linalg.vector_norm(self.decoder_rows(), dim=-1)

    @property
    def bias(self) -> Tensor | None:
        """The decoder's bias [d], None where there is none."""
        return None

    def initialize(self, x: Tensor) -> None:
        """Once, before the first step, with images [N, T, d] as the encoder will see them."""

    def after_backward(self) -> None:
        """After each backward pass, before the optimizer's step."""

    def after_step(self) -> None:
        """After each optimizer's step."""


@dataclass(frozen=True)
class Step:
    """What a loss term may need of a training forward pass.

    Attributes:
        x: the input [..., d].
        scale: what a reconstruction is multiplied with, [..., 1] or a scalar.
        scores, codes: [..., M], tokens as they came or in one row; or [p] on the support.
        latents: whose they are: None (all M), or LongTensor [p].
        tokens: their number N, what sums over them are divided by; 1 if there is none.
        decode_frozen: codes like these -> [..., d]; the decoder receives no gradient.
        architecture: of the SAE.
        relative_error: (reconstruction) -> scalar, the reconstruction loss of this batch.
    """

    x: Tensor
    scale: Tensor
    scores: Tensor
    codes: Tensor
    latents: Tensor | None
    tokens: int
    decode_frozen: Callable[[Tensor], Tensor]
    architecture: Architecture
    relative_error: Callable[[Tensor], Tensor]


class Activation(nn.Module):
    """Maps scores to codes: in evaluation a threshold, z_m = f(s_m) if s_m > tau else 0.

    A subclass's `__init__(self, latents, *, ...)` declares its options as keyword-only arguments.
    """

    encoder_bias = True
    """False where the activation has biases of its own, so that the encoder needs none."""

    across_tokens = False
    """Whether a token's codes in training depend on the batch's other tokens."""

    holds_back = True
    """Whether a score above 0 can be held back. Where none can, a silent latent has nothing to
    give to AuxK, which is then refused."""

    ranks = 1
    """Processes that a training batch is spread over: see `SAE.share_batches`."""

    full_precision: tuple[str, ...] = ()
    """Parameters and buffers that stay float32 (or float64) whatever the SAE is cast to."""

    def __init__(self, latents: int) -> None:
        super().__init__()
        self.latents = latents

    def threshold(self, scores: Tensor) -> Tensor:
        """tau for scores [..., M]: [..., 1] per token, [M] per latent, or a scalar; of the scores'
        precision or a higher one."""
        raise NotImplementedError

    def curve(self, scores: Tensor, tau: Tensor, latents: Tensor | None) -> Tensor:
        """f: the code of a score that passes. Here the score itself."""
        return scores

    def gate(self, scores: Tensor, tau: Tensor, latents: Tensor | None = None) -> Tensor:
        """Codes of scores [..., M], or [..., n] of `latents` ([n] or [B, n]), given tau."""
        tau = per_latent(tau, self.latents, latents)
        return torch.where(above(scores, tau), self.curve(scores, tau, latents), 0)

    def support(self, scores: Tensor) -> Tensor | None:
        """Where codes in training, or gradients of their losses, may differ from 0.

        What opts into sparse training: `forward` then gets the scores at these places only. The
        default is None: all.

        Args:
            scores: [N, M], without gradient. They may be overwritten where codes cannot be.

        Returns:
            LongTensor [p], token * M + latent; None where dense products are faster.
        """
        return None

    def forward(self, scores: Tensor, support: Support | None = None) -> Tensor:
        """Codes in training, with the gradients that the variant defines. May update buffers.

        Args:
            scores: [..., M], tokens as they came or in one row; or [p] on a support.
        """
        latents = None if support is None else support.latent
        return self.gate(scores, self.threshold(scores), latents)

    def losses(self, step: Step) -> dict[str, Tensor]:
        """Loss terms beyond the reconstruction, weighted."""
        return {}

    def candidates(self, scores: Tensor) -> Tensor:
        """How strongly latents would act if none were suppressed, >= 0: where AuxK chooses.

        Element by element, for scores of any shape and any latents.
        """
        return torch.relu(scores)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        # Adam's steps and moving averages are below bfloat16's resolution (8 bits): a threshold
        # cast to it would never move again.
        before = {name: getattr(self, name).data for name in self.full_precision}
        super()._apply(fn, recurse)
        for name, value in before.items():
            now = getattr(self, name)
            if now.dtype in (torch.bfloat16, torch.float16):
                now.data = value.to(now.device)
        return self


def per_latent(values: Tensor, m: int, latents: Tensor | None) -> Tensor:
    """Align [M] values with scores of `latents`: [n] or [B, 1, n]. Others pass unchanged."""
    if latents is None or values.ndim != 1 or values.shape[0] != m:
        return values
    if latents.ndim == 1:
        return values.index_select(0, latents)
    return values[latents][:, None, :]

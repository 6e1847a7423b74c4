"""The contract of an architecture, an activation and an objective, and what an SAE returns.

Letters: B images or tokens, T tokens of an image, N tokens in all, d width, M latents, n latents
kept, p pairs of token and latent.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from clipsae.sae.codes import SparseCodes
from clipsae.sae.engine.reference import Chosen, above
from clipsae.sae.losses import relative_error
from clipsae.sae.sparse_ops import Dictionary, mix


@dataclass(frozen=True)
class SAEOutput:
    """What an SAE returns for a batch.

    Attributes:
        reconstruction: [..., d], in the units of what is reconstructed.
        encoded: the codes [..., M], dense or, in training where few are active, sparse.
        losses: named terms, scalars, already weighted. In eval mode the reconstruction only.
        kept: BoolTensor [...], the tokens that all this is of; the others have no codes, and are
            their own reconstruction. None: all.
    """

    reconstruction: Tensor
    encoded: Tensor | SparseCodes
    losses: dict[str, Tensor]
    kept: Tensor | None = None

    @property
    def codes(self) -> Tensor:
        """[..., M], dense: where `encoded` is sparse, computed at each call."""
        return self.encoded.dense() if isinstance(self.encoded, SparseCodes) else self.encoded

    def fired(self) -> Tensor:
        """LongTensor [M]: how many tokens each latent is active on."""
        if isinstance(self.encoded, SparseCodes):
            return self.encoded.view(-1, self.encoded.latents).count()
        codes = self.encoded.flatten(0, -2)
        if codes.device.type != "cpu" or not len(codes):
            return (codes != 0).sum(dim=0)
        # A few tokens stay in the cache, and their number fits in a byte: int64 sums of booleans
        # take ten times as long.
        active = ((part != 0).view(torch.uint8) for part in codes.split(64))
        return sum(part.sum(dim=0, dtype=torch.uint8).long() for part in active)

    @property
    def loss(self) -> Tensor:
        """The sum of the terms: what is minimised."""
        return torch.stack(list(self.losses.values())).sum()


class Architecture(nn.Module):
    """Maps tokens to scores and, called with codes, codes to tokens; independent of sparsity.

    A subclass's `__init__(self, d, latents, encoder_bias, *, ...)` declares its options as
    keyword-only arguments. `encoder_bias` is False where the activation has its own.
    """

    scores_all = True
    """Whether a latent without a code has a score, from which a dead one can learn."""

    unit_rows = False
    """Whether decoder rows are kept at unit norm: a penalty on codes then needs no norms."""

    def scores(self, x: Tensor, latents: Tensor | None = None) -> Tensor:
        """[..., d] -> [..., M], or [..., n] of `latents` ([n], or [B, n] for x [B, T, d])."""
        raise NotImplementedError

    def combine(self, codes: Tensor | SparseCodes, latents: Tensor | None = None) -> Tensor:
        """Codes [..., M] (or [..., n]) -> what they add to the reconstruction [..., d], without
        the bias. Codes are sparse only where there is a `dictionary`; see `sparse_ops.mix`."""
        raise NotImplementedError

    def combine_parts(self, codes: Tensor, sizes: Sequence[int]) -> Tensor:
        """`combine` of parts of dense codes [N, M], G runs of latents of these sizes: [N, G, d]."""
        parts = zip(
            codes.split(list(sizes), -1), self.decoder_rows().split(list(sizes)), strict=True
        )
        return torch.stack([mix(part, rows) for part, rows in parts], dim=1)

    def forward(self, codes: Tensor | SparseCodes, latents: Tensor | None = None) -> Tensor:
        """`combine` with the bias."""
        combined = self.combine(codes, latents)
        return combined if self.bias is None else combined + self.bias

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

    def dictionary(self) -> Dictionary | None:
        """The encoder as a matrix whose products with `query(x)` are the scores, for sparse
        training. None: only `scores` and `combine` are known, and all products are dense."""
        return None

    def query(self, x: Tensor) -> Tensor:
        """[..., d] -> [..., d]: the dictionary's input."""
        return x

    def matrices(self, part: str) -> list[nn.Parameter]:
        """The matrices that make the scores (`part` "encoder") or `decoder_rows` ("decoder"), for
        `SAE(freeze=...)`; biases are not among them. None, the default: it cannot be frozen."""
        return []

    def initialize(self, x: Tensor) -> None:
        """Once, before the first step, with images [N, T, d] as the encoder will see them."""

    def after_backward(self) -> None:
        """After each backward pass, before the optimizer's step."""

    def after_step(self) -> None:
        """After each optimizer's step."""


@dataclass(frozen=True)
class LossInputs:
    """What a loss term may need of a training forward pass.

    Attributes:
        x: the input [N, d], as the reconstruction loss compares it (`clipsae.sae.normalization`).
        scores, codes: both [N, M], or both sparse codes of the same pairs. `.sum()`, and `*` with
            a factor for each latent [M], serve either.
        tokens: N, what sums over them are divided by; at least 1.
        architecture, activation: of the SAE.
        encoded: the tokens [N, d] as the architecture sees them: its `scores` of them are these.
        dead: BoolTensor [M], the latents that are dead before this step.
        decode: (codes like these, frozen=False) -> [N, d], in units of the target. Its gradients
            reach the codes and, unless frozen, the decoder.
        shape: of the tokens before they were flattened: (B, T) of images, or (B,). N is their
            number, but of an SAE that leaves out tokens.
        target: what is reconstructed [N, d]: x itself, but of a transcoder.
        embeddings: [B, e] of the images, unit length, without gradient; None: not asked for.
        norm: [N], of the target's tokens as they came; None: of the target.
    """

    x: Tensor
    scores: Tensor | SparseCodes
    codes: Tensor | SparseCodes
    tokens: int
    architecture: Architecture
    activation: "Activation"
    encoded: Tensor
    dead: Tensor
    decode: Callable[..., Tensor]
    shape: tuple[int, ...]
    target: Tensor
    embeddings: Tensor | None = None
    norm: Tensor | None = None

    def relative_error(self, reconstruction: Tensor) -> Tensor:
        """The reconstruction loss of another reconstruction [N, d] of this batch, a scalar."""
        return relative_error(reconstruction, self.target, self.norm)


class FullPrecision(nn.Module):
    """A module of which some parts keep their precision in a half precision SAE."""

    full_precision: tuple[str, ...] = ()
    """Parameters and buffers that stay float32 (or float64)."""

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


class Activation(FullPrecision):
    """Maps scores to codes: in evaluation a threshold, z_m = f(s_m) if s_m > tau else 0 (or
    `strength` of s_m > tau).

    A subclass's `__init__(self, latents, *, ...)` declares its options as keyword-only arguments.
    """

    encoder_bias = True
    """False where the activation has biases, so that the encoder needs none."""

    by_size = False
    """Whether a token's codes are those with the largest scores, k of them."""

    own_thresholds = False
    """Whether `threshold` is the same for all scores: a number of each latent, or of all."""

    across_tokens = False
    """Whether a token's codes in training depend on the batch's other tokens."""

    world_size = 1
    """Processes that a training batch is spread over: see `SAE.world_size`."""

    penalties: tuple[str, ...] = ()
    """Those of the loss terms that make codes sparse: a training may let them grow from 0."""

    penalty_scale: float | Tensor = 1.0
    """What the penalties are multiplied by: a training sets it for its steps."""

    def __init__(self, latents: int) -> None:
        super().__init__()
        self.latents = latents

    def threshold(self, scores: Tensor) -> Tensor:
        """tau for scores [..., M]: [..., 1] per token, [M] per latent, or a scalar; of the scores'
        precision or a higher one."""
        raise NotImplementedError

    def strength(self, scores: Tensor) -> Tensor:
        """What of a score must be above the threshold: by default the score itself."""
        return scores

    def magnitude(self, scores: Tensor, tau: Tensor, latents: Tensor | None) -> Tensor:
        """f: the code of a score that passes; by default the score itself."""
        return scores

    def apply_threshold(self, scores: Tensor, tau: Tensor, latents: Tensor | None = None) -> Tensor:
        """Codes of scores [..., M], or [..., n] of `latents` ([n] or [B, n]), given tau."""
        tau = per_latent(tau, self.latents, latents)
        passes = above(self.strength(scores), tau)
        return torch.where(passes, self.magnitude(scores, tau, latents), 0)

    def support(self, scores: Tensor) -> Chosen:
        """Where codes in training, or gradients of their losses, may differ from 0.

        Defining it opts into sparse training: `forward` then gets the scores at these places only.

        Args:
            scores: [N, M], without gradient. They may be overwritten where codes are impossible.

        Returns:
            LongTensor [p], token * M + latent, or what an operation of `clipsae.sae.sparse_ops`
            returned; None, the default, where dense products are faster.
        """
        return None

    def forward(self, scores: Tensor | SparseCodes) -> Tensor | SparseCodes:
        """Codes in training, with the gradients that the variant defines. May update buffers.

        Args:
            scores: [..., M], or sparse at the pairs of `support`. The codes are of the same kind.
        """
        if isinstance(scores, SparseCodes):
            tau, latents = self.threshold(scores.values), scores.latent
            return scores.with_values(self.apply_threshold(scores.values, tau, latents))
        return self.apply_threshold(scores, self.threshold(scores))

    def losses(self, inputs: LossInputs) -> dict[str, Tensor]:
        """Loss terms beyond the reconstruction, weighted; `penalties` without their scale."""
        return {}

    def scaled_losses(self, inputs: LossInputs) -> dict[str, Tensor]:
        """`losses`, the penalties among them multiplied by `penalty_scale`."""
        return {
            name: term * self.penalty_scale if name in self.penalties else term
            for name, term in self.losses(inputs).items()
        }

    def before_step(self, step: int, max_steps: int) -> None:
        """Before each batch of a training that has taken `step` of its `max_steps` steps: sets
        what follows a schedule, in place, as a number would make compiled code compile again."""

    def after_step(self) -> None:
        """After each optimizer's step."""

    def auxk_scores(self, scores: Tensor) -> Tensor:
        """How strongly latents would act if none were suppressed: AuxK keeps the largest of the
        dead. Element by element, for scores of any shape and any latents. Scores below 0 are 0,
        but where those of a dead latent are all below it, so that it would learn nothing."""
        return torch.relu(scores)


class Objective(nn.Module):
    """A loss term that any SAE can have beside its activation's, in training only.

    A subclass's `__init__(self, latents, *, ...)` declares its options as keyword-only arguments
    with defaults. It is part of an SAE where its first option is not the default.
    """

    needs: tuple[str, ...] = ()
    """What `SAE.forward` must be given beside the tokens: "embeddings"."""

    def check(self, architecture: Architecture, activation: Activation) -> None:
        """Refuse, by a ValueError in one sentence, an SAE of such parts."""

    def losses(self, inputs: LossInputs) -> dict[str, Tensor]:
        """Named loss terms, scalars, weighted."""
        return {}

    def after_step(self) -> None:
        """After each optimizer's step."""


def per_latent(numbers: Tensor, m: int, latents: Tensor | None) -> Tensor:
    """Align [M] numbers with scores of `latents`: [n] or [B, 1, n]. Others pass unchanged."""
    if latents is None or numbers.ndim != 1 or numbers.shape[0] != m:
        return numbers
    if latents.ndim == 1:
        return numbers.index_select(0, latents)
    return numbers[latents][:, None, :]


def aligned(numbers: Tensor, scores: Tensor | SparseCodes) -> Tensor:
    """Numbers of each latent [M] so that they fit dense scores [..., M], or the values [p]."""
    return scores.at_latent(numbers) if isinstance(scores, SparseCodes) else numbers

"""Products with sparse codes and their gradients: `Dictionary.find` and `mix`, of the operations of
`clipsae.sae.engine`. Where dense products are faster, or on a device without sparse ones, they are
dense products.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from clipsae.sae.codes import SparseCodes
from clipsae.sae.dense import at_least_float32, empty
from clipsae.sae.engine import backend
from clipsae.sae.engine.reference import Chosen
from clipsae.sae.engine.switch import most_pairs, prefers_dense

Chooser = Callable[[Tensor], Chosen]
"""Scores [n, M] -> where codes may be; None: dense products are faster."""


# --- which pairs, without gradients ---


def positions_above(scores: Tensor, floor: Tensor, by: Tensor | None = None) -> Chosen:
    """Where scores [N, M], or `by`, other numbers [N, M], are above a floor: [N, 1], [M] or a
    scalar. None: dense products are faster."""
    return backend(scores).above(scores, floor, by)


def largest_positions(scores: Tensor, k: int, by: Tensor | None = None) -> Chosen:
    """The k largest of each token's scores [N, M]; `by` other numbers [N, M], if given."""
    return backend(scores).largest(scores, k, by)


# --- with gradients ---


@dataclass(frozen=True)
class Dictionary:
    """The encoder of an SAE whose scores are (x - center) encoder^T + bias.

    One dense product of tokens and encoder remains, that of the scores; gradients touch the active
    pairs alone. Where too many pairs are active (or the activation has no `support`), gradients
    are dense products, one fewer than autograd would do.

    Attributes:
        encoder: [M, d]; bias: [M] or None; center: [d] or None.
    """

    encoder: Tensor
    bias: Tensor | None = None
    center: Tensor | None = None

    def find(
        self,
        x: Tensor,
        choose: Chooser,
        *,
        at_once: bool = False,
        latents: Tensor | None = None,
        wait: bool = True,
    ) -> Tensor | SparseCodes:
        """The scores of the chosen pairs, as sparse codes [N, M]; or all scores [N, M].

        Args:
            x: [N, d].
            choose: where codes may be.
            at_once: it must see all tokens together, not block by block.
            latents: LongTensor [n]: it sees the scores of these alone, and must not return None.
            wait: for the number of codes, where a device computes it; see `SparseCodes.overflows`.
        """
        n, m = len(x), len(self.encoder)
        part, most = self, most_pairs(x, n, m)
        if latents is not None:
            bias = None if self.bias is None else self.bias[latents]
            part, most = Dictionary(self.encoder[latents], bias, self.center), n * len(latents)
        with torch.no_grad():
            found = backend(x).find(x, part.scores, choose, most=most, at_once=at_once, wait=wait)
        if isinstance(found, Tensor):
            return _Scores.apply(x, self.center, self.encoder, self.bias, found, None)
        if latents is not None:
            positions = found.token * m + latents[found.latent]
            found = SparseCodes(found.values, positions, (n, m))
        # (Detached: the graph must not hold its own result.)
        pairs = found.paired(found.values.detach())
        scores = _Scores.apply(x, self.center, self.encoder, self.bias, found.values, pairs)
        return pairs.with_values(scores)

    def scores(self, x: Tensor, buffer: Tensor | None = None) -> Tensor:
        """[N, d] -> [N, M], in the first rows of a buffer from an earlier call if there is one."""
        query = x if self.center is None else x - self.center
        if torch.is_autocast_enabled(x.device.type):
            return nn.functional.linear(query, self.encoder, self.bias)
        if buffer is None:
            buffer = empty(len(x), len(self.encoder), like=query)
        out = buffer if len(x) == len(buffer) else buffer[: len(x)]
        if self.bias is None:
            return torch.mm(query, self.encoder.T, out=out)
        return torch.addmm(self.bias, query, self.encoder.T, out=out)


def mix(codes: Tensor | SparseCodes, rows: Tensor) -> Tensor:
    """Codes times the decoder's rows: [..., M], [M, d] -> [..., d]."""
    if isinstance(codes, SparseCodes):
        return _Mix.apply(codes.values, rows, codes).view(*codes.shape[:-1], rows.shape[1])
    if prefers_dense(codes) or codes.ndim != 2:
        return codes @ rows
    return _Mix.apply(codes, rows, None)


class _Scores(torch.autograd.Function):
    """(x - center) encoder^T + bias, computed before: at pairs [p], or all [N, M].

    The gradient of the center needs no product over tokens: it is - (sum over tokens of the
    scores' gradient) encoder.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        center: Tensor | None,
        encoder: Tensor,
        bias: Tensor | None,
        scores: Tensor,
        pairs: SparseCodes | None,
    ) -> Tensor:
        ctx.save_for_backward(x, center, encoder, bias)
        ctx.pairs = pairs
        ctx.mark_dirty(scores)  # the same memory, now with a gradient
        return scores

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, center, encoder, bias = ctx.saved_tensors
        for_x, for_center, for_encoder, for_bias = ctx.needs_input_grad[:4]
        z = _matrix(gradient, ctx.pairs)
        grads: list[Tensor | None] = [None] * 6
        if for_x:
            rows = encoder.to(z.dtype)
            product = z @ rows if isinstance(z, Tensor) else backend(rows).mix(z, rows)
            grads[0] = product.to(x.dtype)
        if for_center or for_bias:
            summed = _sum_tokens(z)
        if for_center:
            grads[1] = -(summed @ encoder.to(summed.dtype)).to(center.dtype)
        if for_encoder:
            grads[2] = _accumulate(z, x if center is None else x - center).to(encoder.dtype)
        if for_bias:
            grads[3] = summed.to(bias.dtype)
        return tuple(grads)


class _Mix(torch.autograd.Function):
    """Codes times rows [M, d] -> [N, d]: of values [p] at pairs, or all [N, M]."""

    @staticmethod
    def forward(ctx: Any, codes: Tensor, rows: Tensor, pairs: SparseCodes | None) -> Tensor:
        ctx.save_for_backward(codes, rows)
        ctx.pairs = pairs
        if pairs is None:
            return codes @ rows
        wide = at_least_float32(rows)
        return backend(rows).mix(pairs.paired(codes), wide).to(rows.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        codes, rows = ctx.saved_tensors
        for_codes, for_rows, _ = ctx.needs_input_grad
        z = _matrix(codes, ctx.pairs)
        codes_grad = _sample(z, gradient, rows).to(codes.dtype) if for_codes else None
        rows_grad = _accumulate(z, gradient).to(rows.dtype) if for_rows else None
        return codes_grad, rows_grad, None


# Products of a backward pass with a matrix z [N, M], dense or at pairs. Dense ones have the dtype
# of the gradient (half precision, where the forward pass had it); those at pairs float32 at least,
# as sparse kernels have no other.


def _matrix(values: Tensor, pairs: SparseCodes | None) -> Tensor | SparseCodes:
    return values if pairs is None else pairs.paired(at_least_float32(values))


def _accumulate(z: Tensor | SparseCodes, x: Tensor) -> Tensor:
    """x [N, d] -> [M, d]."""
    if isinstance(z, SparseCodes):
        return backend(x).accumulate(z, at_least_float32(x))
    return torch.mm(z.to(x.dtype).T, x, out=empty(z.shape[1], x.shape[1], like=x))


def _sample(z: Tensor | SparseCodes, x: Tensor, rows: Tensor) -> Tensor:
    """x [N, d], rows [M, d] -> [p] or [N, M]."""
    if isinstance(z, SparseCodes):
        x = at_least_float32(x)
        return backend(x).sample(z, x, rows.to(x.dtype))
    return torch.mm(x, rows.to(x.dtype).T, out=empty(len(x), len(rows), like=x))


def _sum_tokens(z: Tensor | SparseCodes) -> Tensor:
    """Sums over tokens, [M], float32 at least."""
    if isinstance(z, SparseCodes):
        return z.sum_tokens(z.values)
    return z.sum(dim=0, dtype=at_least_float32(z[:0]).dtype)

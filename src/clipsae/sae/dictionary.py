"""The two products of an SAE, with gradients that touch the active pairs alone, where few act.

One dense product of tokens and encoder remains, that of the scores. Where too many pairs are
active (or the activation has no `support`) the gradients are dense products, one fewer than
autograd would do: see `_Scores`.

N tokens, d width, M latents, p pairs.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from clipsae.sae.codes import SparseCodes
from clipsae.sae.losses import at_least_float32
from clipsae.sae.memory import empty
from clipsae.sae.sparse_ops import Chooser, backend, prefers_dense


@dataclass(frozen=True)
class Dictionary:
    """The encoder of an SAE whose scores are (x - center) encoder^T + bias.

    Attributes:
        encoder: [M, d]; bias: [M] or None; center: [d] or None.
    """

    encoder: Tensor
    bias: Tensor | None = None
    center: Tensor | None = None

    def find(
        self, x: Tensor, choose: Chooser, *, at_once: bool = False, latents: Tensor | None = None
    ) -> Tensor | SparseCodes:
        """The scores where codes may be, as sparse codes [N, M]; or all scores [N, M].

        Args:
            x: [N, d].
            choose: where codes may be.
            at_once: it must see all tokens together, not block by block.
            latents: LongTensor [n]: it sees the scores of these alone, and must not return None.
        """
        m = len(self.encoder)
        part = self if latents is None else self._part(latents)
        with torch.no_grad():
            found = backend(x).find(x, part.scores, choose, at_once)
        if isinstance(found, Tensor):
            return _Scores.apply(x, self.center, self.encoder, self.bias, found, None)
        values, positions = found
        if latents is not None:
            token = torch.div(positions, len(latents), rounding_mode="floor")
            positions = token * m + latents[positions % len(latents)]
        # (Detached: what the gradient needs must not hold its own result.)
        pairs = SparseCodes(values.detach(), positions, (len(x), m))
        scores = _Scores.apply(x, self.center, self.encoder, self.bias, values, pairs)
        return pairs.with_values(scores)

    def _part(self, latents: Tensor) -> "Dictionary":
        bias = None if self.bias is None else self.bias[latents]
        return Dictionary(self.encoder[latents], bias, self.center)

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
            grads[0] = _mix(z, encoder).to(x.dtype)
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
        return backend(rows).mix(pairs.with_values(codes), wide).to(rows.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        codes, rows = ctx.saved_tensors
        for_codes, for_rows, _ = ctx.needs_input_grad
        z = _matrix(codes, ctx.pairs)
        of_codes = _sample(z, gradient, rows).to(codes.dtype) if for_codes else None
        of_rows = _accumulate(z, gradient).to(rows.dtype) if for_rows else None
        return of_codes, of_rows, None


# Products of a backward pass with a matrix z [N, M], dense or at pairs. Dense ones have the dtype
# of the gradient (half precision, where the forward pass had it); those at pairs float32 at least,
# as sparse kernels have no other.


def _matrix(values: Tensor, pairs: SparseCodes | None) -> Tensor | SparseCodes:
    return values if pairs is None else pairs.with_values(at_least_float32(values))


def _mix(z: Tensor | SparseCodes, rows: Tensor) -> Tensor:
    """rows [M, d] -> [N, d]."""
    if isinstance(z, Tensor):
        return z @ rows.to(z.dtype)
    return backend(rows).mix(z, rows.to(z.dtype))


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

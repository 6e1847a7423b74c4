"""Scores and decoding whose gradients touch the support alone, where there is one.

One dense product of tokens and dictionary remains, that of the scores. Where too many pairs are
active (or the activation has no `support`) the gradients are dense products, with one less than
autograd would do: see `_Scores`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from clipsae.sae.losses import at_least_float32
from clipsae.sae.memory import empty
from clipsae.sae.support import Support

Chooser = Callable[[Tensor], Tensor | None]
"""Scores [N, M] -> positions of pairs, token * M + latent; None: dense."""

BLOCK = 512  # tokens whose scores are in memory together


class _Scores(torch.autograd.Function):
    """(x - center) keys^T + bias, computed before: on the support [p], or all [N, M].

    The gradient of the center needs no product over tokens: it is - (sum over tokens of the
    scores' gradient) keys.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        center: Tensor | None,
        keys: Tensor,
        bias: Tensor | None,
        scores: Tensor,
        support: Support | None,
    ) -> Tensor:
        ctx.save_for_backward(x, center, keys, bias)
        ctx.support = support
        ctx.mark_dirty(scores)  # the same memory, now with a gradient
        return scores

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, center, keys, bias = ctx.saved_tensors
        for_x, for_center, for_keys, for_bias = ctx.needs_input_grad[:4]
        product = _Product(ctx.support, gradient)
        grads: list[Tensor | None] = [None] * 6
        if for_x:
            grads[0] = product.times(product.gradient, keys).to(x.dtype)
        if for_center or for_bias:
            summed = product.per_latent(product.gradient)
        if for_center:
            grads[1] = -(summed @ keys.to(summed.dtype)).to(center.dtype)
        if for_keys:
            query = x if center is None else x - center
            terms = [(product.gradient, query)]
            if ctx.support is not None:
                terms += ctx.support.pending
                ctx.support.pending = []
            grads[2] = product.transposed_times(*terms).to(keys.dtype)
        if for_bias:
            grads[3] = summed.to(bias.dtype)
        return tuple(grads)


class _Mixed(torch.autograd.Function):
    """Z rows, with Z of codes: on the support [p], or all [N, M]; rows [M, d].

    Tied: the rows are the keys of the scores that the codes come from. Their gradient, two [M, d]
    that would be added, is then left to the scores' backward pass, which always follows.
    """

    @staticmethod
    def forward(
        ctx: Any, codes: Tensor, rows: Tensor, support: Support | None, tied: bool
    ) -> Tensor:
        ctx.save_for_backward(codes, rows)
        ctx.support = support
        ctx.tied = tied and support is not None
        if support is None:
            return codes @ rows
        return support.times_rows(codes, at_least_float32(rows)).to(rows.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        codes, rows = ctx.saved_tensors
        for_codes, for_rows, *_ = ctx.needs_input_grad
        product = _Product(ctx.support, gradient)
        of_codes = product.sampled(product.gradient, rows).to(codes.dtype) if for_codes else None
        of_rows = None
        if for_rows:
            term = codes, product.gradient
            if ctx.tied and for_codes:
                ctx.support.pending.append(term)
            else:
                of_rows = product.transposed_times(term).to(rows.dtype)
        return of_codes, of_rows, None, None


class _Product:
    """Products with a matrix Z [N, M] in a backward pass: of values [p] on a support, or dense.

    Dense ones have the gradient's dtype (half precision, where the forward pass had it); those on
    a support float32 at least, as sparse kernels have no other.
    """

    def __init__(self, support: Support | None, gradient: Tensor) -> None:
        self.support = support
        self.gradient = gradient if support is None else at_least_float32(gradient)
        self.dtype = self.gradient.dtype

    def times(self, values: Tensor, rows: Tensor) -> Tensor:
        """Z rows: [M, d] -> [N, d]."""
        rows = rows.to(self.dtype)
        return values @ rows if self.support is None else self.support.times_rows(values, rows)

    def transposed_times(self, *terms: tuple[Tensor, Tensor]) -> Tensor:
        """The sum of Z^T of_tokens over terms, one where dense: [N, d] -> [M, d]."""
        terms = tuple((a.to(self.dtype), b.to(self.dtype)) for a, b in terms)
        if self.support is not None:
            return self.support.transposed_times(*terms)
        ((values, of_tokens),) = terms
        out = empty(values.shape[1], of_tokens.shape[1], like=of_tokens)
        return torch.mm(values.T, of_tokens, out=out)

    def sampled(self, of_tokens: Tensor, rows: Tensor) -> Tensor:
        """of_tokens rows^T where Z is: [N, d], [M, d] -> [p] or [N, M]."""
        rows = rows.to(self.dtype)
        if self.support is not None:
            return self.support.sampled(of_tokens, rows)
        return torch.mm(of_tokens, rows.T, out=empty(len(of_tokens), len(rows), like=rows))

    def per_latent(self, values: Tensor) -> Tensor:
        """Sums over tokens, [M], float32 at least."""
        if self.support is None:
            return values.sum(dim=0, dtype=at_least_float32(values[:0]).dtype)
        return self.support.per_latent(values)


@dataclass(frozen=True)
class Dictionary:
    """The matrices of an SAE whose scores are (x - center) keys^T + bias.

    Attributes:
        keys: [M, d]; bias: [M] or None; center: [d] or None.
        rows: [M, d], what codes mix.
    """

    keys: Tensor
    rows: Tensor
    bias: Tensor | None = None
    center: Tensor | None = None

    def find(
        self, x: Tensor, choose: Chooser, *, together: bool = False, latents: Tensor | None = None
    ) -> tuple[Tensor, Support | None]:
        """The scores on the support [p] and the support, or all scores [N, M] and None.

        Args:
            x: [N, d].
            choose: where codes may be.
            together: show it all tokens at once, not block by block.
            latents: LongTensor [n]: show it the scores of these alone. It must not say None then.
        """
        of = self if latents is None else self._part(latents)
        found = of._find(x, choose, len(x) if together else min(len(x), BLOCK))
        if isinstance(found, Tensor):
            return self._differentiable(x, found, None), None
        values, positions = found
        if latents is not None:
            n = len(latents)
            token = torch.div(positions, n, rounding_mode="floor")
            positions = token * len(self.keys) + latents[positions % n]
        support = Support(positions, len(x), len(self.keys))
        return self._differentiable(x, values, support), support

    @torch.no_grad()
    def _find(self, x: Tensor, choose: Chooser, block: int) -> Tensor | tuple[Tensor, Tensor]:
        """All scores, or those that are chosen and their positions."""
        if not len(x):
            return x.new_empty(0), torch.empty(0, dtype=torch.int64, device=x.device)
        values, positions, buffer = [], [], None
        for start in range(0, len(x), block):
            scores = buffer = self.scores(x[start : start + block], buffer)
            chosen = choose(scores)
            if chosen is None:
                return scores if block == len(x) else self._all(x, scores if start == 0 else None)
            values.append(scores.flatten().index_select(0, chosen))
            positions.append(chosen + start * scores.shape[1])
        return torch.cat(values), torch.cat(positions)

    def _all(self, x: Tensor, first: Tensor | None) -> Tensor:
        """All scores, of which the first tokens' may be there."""
        if first is None:
            return self.scores(x)
        out = empty(len(x), len(self.keys), like=first)
        out[: len(first)] = first
        if len(first) < len(x):
            rest = self.scores(x[len(first) :], out[len(first) :])
            if rest.data_ptr() != out[len(first) :].data_ptr():  # under autocast
                out[len(first) :] = rest
        return out

    def mixed(self, codes: Tensor, support: Support | None, frozen: bool = False) -> Tensor:
        """Z rows: codes [p] on a support, or [N, M] -> [N, d]. Frozen: rows get no gradient."""
        rows = self.rows.detach() if frozen else self.rows
        return _Mixed.apply(codes, rows, support, self.rows is self.keys)

    def _part(self, latents: Tensor) -> "Dictionary":
        bias = None if self.bias is None else self.bias[latents]
        return Dictionary(self.keys[latents], self.rows, bias, self.center)

    def scores(self, x: Tensor, buffer: Tensor | None = None) -> Tensor:
        """[N, d] -> [N, M], in the first rows of a buffer from an earlier call if there is one."""
        query = x if self.center is None else x - self.center
        if torch.is_autocast_enabled(x.device.type):
            return nn.functional.linear(query, self.keys, self.bias)
        if buffer is None:
            buffer = empty(len(x), len(self.keys), like=query)
        out = buffer if len(x) == len(buffer) else buffer[: len(x)]
        if self.bias is None:
            return torch.mm(query, self.keys.T, out=out)
        return torch.addmm(self.bias, query, self.keys.T, out=out)

    def _differentiable(self, x: Tensor, scores: Tensor, support: Support | None) -> Tensor:
        return _Scores.apply(x, self.center, self.keys, self.bias, scores, support)

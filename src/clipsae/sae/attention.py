"""The attention architecture: one dictionary C gives keys and values.

Sparsemax SAE (arXiv 2604.14925, CVPR 2026):

    Q = x W_Q     K = C W_K     V = C W_V     scores = Q K^T / scale     x_hat = z V

As products are associative, Q K^T = (Q W_K^T) C^T and z V = (z C) W_V: K and V, M x d each, are
never formed.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from clipsae.sae.base import Architecture
from clipsae.sae.checks import one_of, positive
from clipsae.sae.codes import SparseCodes
from clipsae.sae.dense import at_least_float32, empty
from clipsae.sae.registry import ARCHITECTURES
from clipsae.sae.sparse_ops import Dictionary, mix

QUERIES = ("identity", "learned")


@ARCHITECTURES.register("attention")
class Attention(Architecture):
    """A dictionary C [M, d], W_K and W_V [d, d]; no biases.

    C serves both ways: with `SAE(freeze="decoder")` C and W_V stay as they are and the query's side
    (W_K, W_Q) is trained, with "encoder" all but W_V stays.

    Args:
        d: width of the tokens.
        latents: M.
        encoder_bias: unused; there are no biases.
        query: "identity": Q = x (released code); "learned": Q = x W_Q (the paper's text),
            which starts as W_K does.
        scale: what the scores are divided by: a number (released code: 1), or "sqrt_d" (the text).
    """

    def __init__(
        self,
        d: int,
        latents: int,
        encoder_bias: bool = True,
        *,
        query: str = "identity",
        scale: float | str = 1.0,
    ) -> None:
        super().__init__()
        one_of("query", query, QUERIES)
        if scale != "sqrt_d":
            positive("scale", scale, ", or 'sqrt_d'")
        self.scale = math.sqrt(d) if scale == "sqrt_d" else float(scale)
        self.C = nn.Parameter(_kaiming(latents, d, fan_in=latents))
        self.W_Q = nn.Parameter(_kaiming(d, d, fan_in=d)) if query == "learned" else None
        self.W_K = nn.Parameter(_kaiming(d, d, fan_in=d))
        self.W_V = nn.Parameter(_kaiming(d, d, fan_in=d))

    def dictionary(self) -> Dictionary:
        return Dictionary(self.C)

    def query(self, x: Tensor) -> Tensor:
        q = x if self.W_Q is None else x @ self.W_Q
        # Scaled while it is [..., d], not [..., M].
        return (q @ self.W_K.T) / self.scale

    def scores(self, x: Tensor, latents: Tensor | None = None) -> Tensor:
        return self.query(x) @ self._rows(latents).mT

    def combine(self, codes: Tensor | SparseCodes, latents: Tensor | None = None) -> Tensor:
        if isinstance(codes, SparseCodes) or latents is None:
            return mix(codes, self.C) @ self.W_V
        # From the side that has fewer rows.
        if codes.ndim > 1 and latents.shape[-1] < codes.shape[-2]:
            return codes @ self.decoder_rows(latents)
        return (codes @ self.C[latents]) @ self.W_V

    def combine_parts(self, codes: Tensor, sizes: Sequence[int]) -> Tensor:
        parts = zip(codes.split(list(sizes), -1), self.C.split(list(sizes)), strict=True)
        return torch.stack([mix(part, rows) for part, rows in parts], dim=1) @ self.W_V

    def decoder_rows(self, latents: Tensor | None = None) -> Tensor:
        return self._rows(latents) @ self.W_V

    def matrices(self, part: str) -> list[nn.Parameter]:
        if part == "decoder":
            return [self.C, self.W_V]
        return [self.C, self.W_K] + ([] if self.W_Q is None else [self.W_Q])

    def decoder_norms(self) -> Tensor:
        with torch.autocast(self.C.device.type, enabled=False):  # a difference of large numbers
            return _Norms.apply(self.C, self.W_V)

    def _rows(self, latents: Tensor | None) -> Tensor:
        return self.C if latents is None else self.C[latents]


class _Norms(torch.autograd.Function):
    """||c W|| of each row c of C [M, d], W [d, d] -> [M], as sqrt(c G c^T) with G = W W^T.

    Two products with C there and back, where those of C W take three: c G, which the norm needs,
    is also its gradient but for a factor.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, matrix: Tensor) -> Tensor:
        wide, w = at_least_float32(rows), at_least_float32(matrix)
        by_g = torch.mm(wide, w @ w.T, out=empty(*rows.shape, like=wide))
        parts = zip(by_g.split(1024), wide.split(1024), strict=True)  # that stay in the cache
        squares = [(a * b).sum(dim=-1) for a, b in parts]
        norms = torch.cat(squares).clamp(min=0).sqrt()
        ctx.save_for_backward(rows, matrix, by_g, norms)
        return norms.to(rows.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        rows, matrix, by_g, norms = ctx.saved_tensors
        wide, w = at_least_float32(rows), at_least_float32(matrix)
        factor = torch.where(norms > 0, gradient.to(norms.dtype) / norms, 0)[:, None]
        scaled = torch.mul(wide, factor, out=empty(*wide.shape, like=wide))
        matrix_grad = (wide.T @ scaled) @ w
        rows_grad = torch.mul(by_g, factor, out=scaled)
        return rows_grad.to(rows.dtype), matrix_grad.to(matrix.dtype)


def _kaiming(rows: int, columns: int, fan_in: int) -> Tensor:
    bound = math.sqrt(6 / fan_in)
    return nn.init.uniform_(torch.empty(rows, columns), -bound, bound)

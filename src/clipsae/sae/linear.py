"""The linear architecture: scores (x - b_dec) W_enc^T + b_enc, reconstruction z W_dec + b_dec.

Bricken et al., "Towards Monosemanticity", 2023; PatchSAE (Lim et al., ICLR 2025,
https://github.com/dynamical-inference/patchsae) for initialisation and unit rows.
"""

import math

import torch
from torch import Tensor, nn

from clipsae.sae.base import Architecture
from clipsae.sae.checks import boolean, one_of
from clipsae.sae.codes import SparseCodes
from clipsae.sae.dense import row_parts
from clipsae.sae.registry import ARCHITECTURES
from clipsae.sae.sparse_ops import Dictionary, mix

ENCODER_INITS = ("independent", "tied")
BIAS_INITS = ("images", "tokens", "zero")


@ARCHITECTURES.register("linear")
class Linear(Architecture):
    """Two matrices with a row per latent, W_enc and W_dec [M, d], and two biases.

    Args:
        d: width of the tokens.
        latents: M.
        encoder_bias: whether there is a b_enc.
        encoder_init: "independent": Kaiming-uniform of fan-in M, as PatchSAE's [d, M] matrix
            gets it (bound sqrt(6/M)); "tied": a copy of W_dec (dictionary_learning). Only the
            start: they are trained apart.
        unit_decoder: decoder rows have norm 1 after each step; gradients lose their part along
            the row.
        bias_init: b_dec starts as the geometric median of a batch. "images": an image's [T, d]
            tokens are one point of T x d numbers, the result is averaged over the T positions
            (PatchSAE); "tokens": each token is a point (dictionary_learning); "zero": stays 0.
        subtract_bias: encode x - b_dec; False: x itself, as where b_dec is of other tokens
            (transcoders).
    """

    def __init__(
        self,
        d: int,
        latents: int,
        encoder_bias: bool = True,
        *,
        encoder_init: str = "independent",
        unit_decoder: bool = True,
        bias_init: str = "images",
        subtract_bias: bool = True,
    ) -> None:
        super().__init__()
        one_of("encoder_init", encoder_init, ENCODER_INITS)
        boolean("unit_decoder", unit_decoder)
        one_of("bias_init", bias_init, BIAS_INITS)
        self.unit_rows = unit_decoder
        boolean("subtract_bias", subtract_bias)
        self.bias_init = bias_init
        self.subtract_bias = subtract_bias
        self.W_dec = nn.Parameter(torch.empty(latents, d))
        self.W_enc = nn.Parameter(torch.empty(latents, d))
        self.b_dec = nn.Parameter(torch.zeros(d))
        self.b_enc = nn.Parameter(torch.zeros(latents)) if encoder_bias else None
        with torch.no_grad():
            nn.init.uniform_(self.W_dec, -math.sqrt(6 / d), math.sqrt(6 / d))
            self._normalize_rows()  # at the start also where unit rows are not kept
            if encoder_init == "tied":
                self.W_enc.copy_(self.W_dec)
            else:
                nn.init.uniform_(self.W_enc, -math.sqrt(6 / latents), math.sqrt(6 / latents))

    def dictionary(self) -> Dictionary | None:
        return Dictionary(self.W_enc, self.b_enc, self.b_dec if self.subtract_bias else None)

    def scores(self, x: Tensor, latents: Tensor | None = None) -> Tensor:
        u = x - self.b_dec if self.subtract_bias else x
        if latents is None:
            return nn.functional.linear(u, self.W_enc, self.b_enc)
        scores = u @ self.W_enc[latents].mT
        if self.b_enc is None:
            return scores
        b = self.b_enc[latents]
        return scores + (b if latents.ndim == 1 else b[:, None, :])

    def combine(self, codes: Tensor | SparseCodes, latents: Tensor | None = None) -> Tensor:
        if isinstance(codes, SparseCodes) or latents is None:
            return mix(codes, self.W_dec)
        return codes @ self.W_dec[latents]

    def decoder_rows(self, latents: Tensor | None = None) -> Tensor:
        return self.W_dec if latents is None else self.W_dec[latents]

    @property
    def bias(self) -> Tensor:
        return self.b_dec

    def matrices(self, part: str) -> list[nn.Parameter]:
        return [self.W_enc if part == "encoder" else self.W_dec]

    @torch.no_grad()
    def initialize(self, x: Tensor) -> None:
        if self.bias_init == "images":
            median = geometric_median(x.flatten(1)).view(x.shape[1:]).mean(dim=0)
        elif self.bias_init == "tokens":
            median = geometric_median(x.flatten(0, 1))
        else:
            return
        self.b_dec.copy_(median)

    @torch.no_grad()
    def after_backward(self) -> None:
        if self.unit_rows and self.W_dec.grad is not None:
            parts = row_parts(self.W_dec.grad), row_parts(self.W_dec)
            for gradient, rows in zip(*parts, strict=True):
                along = (gradient * rows).sum(dim=-1, keepdim=True)
                gradient.addcmul_(along, rows, value=-1)

    @torch.no_grad()
    def after_step(self) -> None:
        if self.unit_rows and self.W_dec.requires_grad:  # a frozen row keeps its bits
            self._normalize_rows()

    def _normalize_rows(self) -> None:
        for rows in row_parts(self.W_dec):
            norm = torch.linalg.vector_norm(rows, dim=-1, keepdim=True)
            rows.div_(torch.where(norm > 0, norm, 1))


def geometric_median(points: Tensor, iterations: int = 100, tolerance: float = 1e-20) -> Tensor:
    """The point with the least sum of distances, by Weiszfeld's algorithm, as PatchSAE runs it.

    Args:
        points: [N, p].
        iterations: at most this many.
        tolerance: stops when the sum of distances changes by less, relatively.

    Returns:
        [p], in the points' dtype; the work is done in float64.
    """
    wide = points.double()
    median = wide.mean(dim=0)
    before = None
    for _ in range(iterations):
        distance = torch.linalg.vector_norm(wide - median, dim=1)
        total = distance.sum()
        if before is not None and abs(before - total) <= tolerance * total:
            break
        before = total
        weight = 1 / distance.clamp(min=1e-6)  # the median may be one of the points
        median = (weight[:, None] * wide).sum(dim=0) / weight.sum()
    return median.to(points.dtype)

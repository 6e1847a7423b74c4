"""What is done to tokens before an architecture sees them, and undone after it.

    y = (x - mean) W        u = y / s        y_hat = s u_hat        x_hat = y_hat W^-1 + mean

The architecture maps u to u_hat; the reconstruction loss compares y with y_hat.

| normalize    | mean      | W                                        | s                         |
|--------------|-----------|------------------------------------------|---------------------------|
| "none"       | 0         | 1                                        | 1                         |
| "unit"       | 0         | 1                                        | ||x|| of each token       |
| "layer_norm" | of each   | 1                                        | the deviation of each     |
|              | token's d |                                          | token's d numbers + 1e-5  |
| "mean_std"   | of tokens | 1                                        | the deviation, one number |
| "whiten"     | of tokens | V diag(lambda^(-strength / 2)) V^T times | the deviation, one number |
|              |           | a number, see `Normalization`            |                           |

With `position_mean` the mean is that of each position of an image (CLS, the first patch, ...; of an
SAE of both towers the image and its caption). A token alone, [..., 1, d], is at the first position.

One deviation for all dimensions (the root of their mean variance), where others have one for each
(visaebench): it changes the unit of the tokens and leaves their geometry as it is, so that the
cosines of decoder rows, and the losses of two SAEs, mean what they mean without it. A deviation for
each dimension is a whitening in the neurons' basis; "whiten" does it in that of the principal
components. W is symmetric (ZCA), of all whitenings the one that changes tokens least: Kessy, Lewin
and Strimmer, "Optimal Whitening and Decorrelation", 2018 (arXiv 1512.00809).
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from clipsae.sae.base import FullPrecision
from clipsae.sae.checks import boolean, fraction, one_of
from clipsae.sae.dense import at_least_float32

KINDS = ("none", "unit", "layer_norm", "mean_std", "whiten")
LAYER_NORM_EPSILON = 1e-5
"""Added to a token's deviation, as SAELens and BatchTopK do."""
LEAST_VARIANCE = 1e-6
"""Variances along principal components are at least this share of their mean, so that directions in
which the tokens hardly vary are not blown up."""


class Moments:
    """The sums over tokens that means and covariances are made of, in float64; the tokens
    themselves need not be in memory together."""

    def __init__(self) -> None:
        self.images = 0
        self.sums: Tensor | float = 0.0  # [T, d]
        self.products: Tensor | float = 0.0  # [d, d]

    @classmethod
    def of(cls, batches: Iterable[Tensor]) -> "Moments":
        """Those of batches of images [n, T, d]."""
        moments = cls()
        for batch in batches:
            moments.add(batch)
        return moments

    @torch.no_grad()
    def add(self, x: Tensor) -> None:
        """Images [n, T, d]."""
        wide = x.double()
        flat = wide.flatten(0, 1)
        self.images += len(x)
        self.sums = self.sums + wide.sum(dim=0)
        self.products = self.products + flat.T @ flat

    def mean(self, positions: bool) -> Tensor:
        """[d], or [T, d] of each position; float64 on the CPU, as the covariance is.

        Raises:
            ValueError: there were no images.
        """
        if not isinstance(self.sums, Tensor) or not self.images:
            raise ValueError("statistics of no tokens: expected one image at least")
        mean = self.sums.cpu() / self.images
        return mean if positions else mean.mean(dim=0)

    def covariance(self, positions: bool) -> Tensor:
        """[d, d], about `mean(positions)`."""
        mean, products = self.mean(positions), self.products
        assert isinstance(self.sums, Tensor)
        assert isinstance(products, Tensor)
        mean = mean.expand(self.sums.shape)
        return products.cpu() / (self.images * len(mean)) - mean.T @ mean / len(mean)


class Normalization(FullPrecision):
    """x -> y and back. Its statistics are parameters without gradients, as buffers would be copied
    and averaged over ranks in each step; before `fit` they leave tokens as they are.

    Args:
        d: width of the tokens.
        kind: one of `KINDS`.
        strength: of the whitening, from 0 to 1. A variance lambda becomes lambda^(1 - strength),
            times the number that leaves the mean variance as it was: 0 is "mean_std", 1 gives all
            directions the same variance.
        position_mean: the mean is that of each position.

    Attributes:
        mean: [d], or [T, d] of each position; None: 0.
        deviation: [1], None where tokens are not divided by it.
        whitening, coloring: W and its inverse, [d, d]; None: 1.

    Raises:
        ValueError: an invalid option, or one that would do nothing.
    """

    def __init__(
        self, d: int, kind: str = "none", strength: float = 1.0, position_mean: bool = False
    ) -> None:
        super().__init__()
        one_of("normalize", kind, KINDS)
        fraction("whitening", strength, "a number from 0 to 1", zero=True, one=True)
        boolean("position_mean", position_mean)
        if strength != 1 and kind != "whiten":
            raise ValueError(
                f"whitening={strength} does nothing with normalize={kind}: set normalize to "
                "whiten, or leave it out"
            )
        if position_mean and kind in ("unit", "layer_norm"):
            raise ValueError(
                f"position_mean=True: normalize={kind} divides each token by a number of its own "
                "as it is: set normalize to none, mean_std or whiten"
            )
        self.layer_norm = kind == "layer_norm"
        self.strength = float(strength)
        self.position_mean = position_mean
        self.fitted = False
        standardised = kind in ("mean_std", "whiten")
        self.mean = _constant(torch.zeros(d)) if standardised or position_mean else None
        self.deviation = _constant(torch.ones(1)) if standardised else None
        self.whitening = _constant(torch.eye(d)) if kind == "whiten" else None
        self.coloring = _constant(torch.eye(d)) if kind == "whiten" else None
        self.full_precision = tuple(name for name, _ in self.named_parameters())

    @property
    def learned(self) -> bool:
        """Whether it has statistics."""
        return self.mean is not None

    @torch.no_grad()
    def fit(self, moments: Moments) -> None:
        """Set the statistics, once, before the first step. Nothing to do without any.

        Raises:
            ValueError: no tokens.
        """
        self.fitted = True
        if self.mean is None:
            return
        mean, covariance = (f(self.position_mean) for f in (moments.mean, moments.covariance))
        self.mean = _like(self.mean, mean)
        variance = covariance.diagonal().mean().clamp(min=0)
        if self.deviation is not None:
            deviation = torch.where(variance > 0, variance, 1).sqrt()
            self.deviation.copy_(deviation)
        if self.whitening is not None and self.coloring is not None and variance > 0:
            values, vectors = torch.linalg.eigh(covariance)
            share = (values / variance).clamp(min=LEAST_VARIANCE)
            gain = share ** (-self.strength / 2)
            gain = gain / (share * gain.square()).mean().sqrt()
            self.whitening.copy_((vectors * gain) @ vectors.T)
            self.coloring.copy_((vectors / gain) @ vectors.T)

    def forget_positions(self, count: int) -> None:
        """The mean of the first `count` positions in place of that of each, for tokens of which no
        more is known than that they are at one of these."""
        if self.mean is not None and self.mean.ndim == 2:
            self.mean = _like(self.mean, self.mean.detach()[:count].mean(dim=0))

    def forward(self, x: Tensor) -> Tensor:
        """Tokens [..., d] -> y, of their shape and dtype.

        Raises:
            ValueError: with `position_mean`, tokens [..., d] of another number of positions.
        """
        mean = self.mean_of(x)
        if mean is None:
            return x - own_mean(x) if self.layer_norm else x
        with torch.autocast(x.device.type, enabled=False):  # a difference of large numbers
            y = at_least_float32(x) - mean
            return (y if self.whitening is None else y @ self.whitening).to(x.dtype)

    def inverse(self, y: Tensor, shifted: bool = True, of: Tensor | None = None) -> Tensor:
        """y [..., d] -> x.

        Args:
            shifted: with the mean, as tokens have it and decoder rows do not.
            of: the tokens [..., d] whose own mean it is with "layer_norm".
        """
        if self.mean is None:
            return y + own_mean(of) if self.layer_norm and of is not None else y
        with torch.autocast(y.device.type, enabled=False):
            x = at_least_float32(y)
            x = x if self.coloring is None else x @ self.coloring
            mean = self.mean_of(y) if shifted else None
            if mean is not None:
                x = x + mean
            return x.to(y.dtype)

    def mean_of(self, x: Tensor) -> Tensor | None:
        """The mean of tokens like x [..., d]: [d], or with `position_mean` [T, d], [1, d] of the
        first position alone; None: 0.

        Raises:
            ValueError: with `position_mean`, tokens of another number of positions.
        """
        mean = self.mean
        if mean is None or mean.ndim == 1 or x.shape[-2:] == mean.shape:
            return mean
        if x.shape[-2:] == mean[:1].shape:
            return mean[:1]
        raise ValueError(
            f"tokens of shape {tuple(x.shape)}: with position_mean=True the SAE has the means of "
            f"{len(mean)} positions and takes whole images, [..., {len(mean)}, {mean.shape[1]}], "
            "or their first tokens alone"
        )

    def _load_from_state_dict(self, state: dict[str, Tensor], prefix: str, *rest: Any) -> None:
        mean = state.get(f"{prefix}mean")
        if self.mean is not None and mean is not None and self.position_mean and mean.ndim == 2:
            self.mean = _like(self.mean, mean.new_empty(mean.shape))  # [d] before it is fitted
        self.fitted = True
        super()._load_from_state_dict(state, prefix, *rest)


def own_mean(x: Tensor) -> Tensor:
    """The mean of the d numbers of each token [..., d], [..., 1]."""
    return at_least_float32(x).mean(dim=-1, keepdim=True).to(x.dtype)


def _constant(values: Tensor) -> nn.Parameter:
    return nn.Parameter(values, requires_grad=False)


def _like(parameter: nn.Parameter, values: Tensor) -> nn.Parameter:
    return _constant(values.to(parameter))

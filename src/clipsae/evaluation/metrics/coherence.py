"""Spatial coherence: do the patches on which a latent is active lie together?

Moran, "Notes on Continuous Stochastic Phenomena" (1950): of a map x of P patches, with W_ij = 1 for
the (up to eight) neighbours of a patch and y = x - mean(x),

    I = (P / sum W) (y^T W y) / (y^T y),

1 for a smooth map, about -1 / (P - 1) for a random one, negative for a chessboard. Which maps count
is visaebench's rule (https://github.com/vraj130/visaebench, 0.1.0, `feature_localization`).

B images, P = h w patches, M latents.
"""

from functools import partial
from math import prod

import torch
from torch import Tensor, nn

from clipsae.evaluation.floors import DIRECTIONS, REFERENCES
from clipsae.evaluation.metrics.base import METRICS, Measurement, Options
from clipsae.evaluation.metrics.sample import Draw
from clipsae.evaluation.numbers import Number
from clipsae.evaluation.passes import Batch
from clipsae.sae import SAE, SparseCodes

LEAST_PATCHES = 5  # on which a latent is active in an image that counts
LARGEST_SHARE = 0.9  # of the patches; a latent that is active on more is the background's
LEAST_IMAGES = 50  # of a latent that is scored
NOT_LOCALIZED = 0.1  # a mean I below
FLOOR_IMAGES = 500  # of the sample, on which the floors are measured
_SMALLEST = 1e-10  # y^T y of a map that is not constant

# One of each two opposite neighbours: W is symmetric.
_HALF = ((0, 1), (1, -1), (1, 0), (1, 1))


def morans_i(codes: SparseCodes, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Moran's I of each latent's map on each image.

    Args:
        codes: [B, P, M], ascending, patches row by row.
        grid: (h, w), P = h w.

    Returns:
        float64 [B, M], NaN for constant maps (y^T y <= 1e-10), and whether it counts, BoolTensor
        [B, M]: the map is not constant, and 5 patches or more, and at most int(0.9 P), are active.

    Raises:
        ValueError: another number of patches.
    """
    (h, w), (b, p, m) = grid, codes.shape
    if p != h * w:
        raise ValueError(f"codes of {p} patches with a grid of {h} x {w}: expected {h * w} patches")
    values = codes.values.double()
    # The sparse codes are gone through four times, once for each pair of opposite neighbours,
    # which are looked up in the dense ones.
    dense = codes.values.new_zeros(b * p * m, dtype=torch.float64)
    dense[codes.positions] = values
    image, patch = torch.div(codes.token, p, rounding_mode="floor"), codes.token % p
    row, column = torch.div(patch, w, rounding_mode="floor"), patch % w
    to = image * m + codes.latent

    def total(each: Tensor) -> Tensor:
        return values.new_zeros(b * m).index_add_(0, to, each)

    pairs, ones = torch.zeros_like(values), values.new_ones(1, 1, h, w)
    for down, right in _HALF:
        r, c = row + down, column + right
        there = (r >= 0) & (r < h) & (c >= 0) & (c < w)
        at = torch.where(there, codes.positions + (down * w + right) * m, codes.positions)
        pairs += 2 * values * torch.where(there, dense[at], 0)
    degree = nn.functional.conv2d(ones, values.new_ones(1, 1, 3, 3), padding=1)[0, 0] - 1
    mean = total(values) / p
    of_degree = total(values * degree.flatten()[patch])
    weights = degree.sum()
    above = total(pairs) - 2 * mean * of_degree + mean.square() * weights
    # Not sum x^2 - P mean^2, which loses what little a nearly constant map varies by.
    active = total((codes.values != 0).double())
    spread = total((values - mean[to]).square()) + (p - total(torch.ones_like(values))) * (
        mean.square()
    )
    varies = spread > _SMALLEST
    counts = varies & (active >= LEAST_PATCHES) & (active <= int(LARGEST_SHARE * p))
    score = p / weights * above / spread
    return torch.where(varies, score, torch.nan).view(b, m), counts.view(b, m)


_number = partial(Number, table="probing")


@METRICS.register("spatial_coherence")
class SpatialCoherence(Measurement):
    """Mean of `morans_i` over the latents that have `LEAST_IMAGES` images that count, on a sample
    of images; of a latent the mean over those images. Beside it the same of random directions and
    of an untrained SAE, on some 500 of the images: neighbouring patches look alike, whatever looks
    at them.

    visaebench stops at 200 images of a latent and draws 500 latents; here all count. M float64 and
    M integers are kept, and as many for each floor.
    """

    numbers = (
        _number(
            "feature_localization",
            "spatial coherence",
            "Moran's I (eight neighbours) of a latent's patches, mean over images and latents",
            floor="feature_localization_untrained",
        ),
        _number("median_morans_i", "median spatial coherence"),
        _number(
            "frac_non_localized",
            "scattered latents",
            f"share of latents whose mean Moran's I is below {NOT_LOCALIZED}",
            format=".1%",
            better="min",
        ),
        _number(
            "num_evaluable_features", "latents with a spatial coherence", format=".0f", better=""
        ),
        *(
            Number(f"feature_localization_{of}", f"spatial coherence ({of})", said, table="")
            for of, said in REFERENCES.items()
        ),
    )
    needs = ("patches",)

    total: Tensor
    counted: Tensor
    total_random: Tensor
    counted_random: Tensor
    total_untrained: Tensor
    counted_untrained: Tensor

    def __init__(self, sae: SAE, options: Options) -> None:
        super().__init__(sae, options)
        self.draw = Draw(options.images, 1, options.sample_images, options.seed)
        self.every = -(-len(self.draw.drawn) // FLOOR_IMAGES)
        for of, m in (
            ("", self.latents),
            ("_random", 2 * DIRECTIONS),
            ("_untrained", self.latents),
        ):
            self.add_state(f"total{of}", torch.zeros(m).double(), dist_reduce_fx="sum")
            self.add_state(f"counted{of}", torch.zeros(m).long(), dist_reduce_fx="sum")

    def update(self, batch: Batch) -> None:
        rows, numbers = self.draw.among(batch.positions)
        if not len(rows):
            return
        grid = self.options.grid
        patches = prod(grid)
        self._add("", *morans_i(batch.patch_codes(rows, patches), grid))
        some = rows[numbers % self.every == 0]
        if not len(some):
            return
        x = batch.tokens[some, -patches:].float()
        random, twin = (batch.floors[of] for of in ("random", "untrained"))
        of_random = batch.images.once(  # the same for all SAEs
            ("coherence", batch.rows.start, batch.rows.stop),
            lambda: morans_i(random.encode_sparse(x), grid),
        )
        self._add("_random", *of_random)
        self._add("_untrained", *morans_i(twin.encode_sparse(x), grid))

    def _add(self, of: str, scores: Tensor, counts: Tensor) -> None:
        total, counted = getattr(self, f"total{of}"), getattr(self, f"counted{of}")
        total += torch.where(counts, scores, 0).sum(dim=0)
        counted += counts.sum(dim=0)

    def compute(self) -> dict[str, Tensor]:
        """The numbers; NaN where no latent has enough images."""
        scores = {of: self._scores(of) for of in ("", "_random", "_untrained")}
        self.per_latent = {"spatial_coherence": scores[""]}
        live = scores[""][~scores[""].isnan()]
        return {
            "feature_localization": live.mean(),
            "median_morans_i": live.quantile(0.5) if len(live) else live.mean(),
            "frac_non_localized": (live < NOT_LOCALIZED).double().mean(),
            "num_evaluable_features": torch.tensor(len(live)),
            **{f"feature_localization{of}": one.nanmean() for of, one in scores.items() if of},
        }

    def _scores(self, of: str) -> Tensor:
        total, counted = getattr(self, f"total{of}"), getattr(self, f"counted{of}")
        return torch.where(counted >= LEAST_IMAGES, total / counted, torch.nan)

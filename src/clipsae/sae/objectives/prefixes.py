"""Nested dictionaries: the first latents must reconstruct alone, too.

Bussmann et al., "Learning Multi-Level Features with Matryoshka Sparse Autoencoders", 2025 (arXiv
2503.17547). With prefixes n_1 < ... < n_G = M of the dictionary, in the place of the reconstruction
loss stands

    sum_g w_g loss(x, b_dec + sum_{m <= n_g} z_m W_dec[m]),    sum_g w_g = 1

The codes are those of all M: k, thresholds and AuxK, which reconstructs the residual of all, are as
without. The paper sums the losses; a mean keeps the scale to which the other terms' weights belong.

`drawn` are the prefixes of saev (https://github.com/OSU-NLP-Group/saev), from Nabeshima's
"Matryoshka Sparse Autoencoders" (2024): at each step other ones, n without replacement from 1 to
M - 1 with P(at most n) proportional to 1 - n^(-1/2), and M.
"""

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from clipsae.rules import is_number, is_whole
from clipsae.sae.base import Architecture
from clipsae.sae.checks import whole
from clipsae.sae.codes import SparseCodes
from clipsae.sae.nested import Nested, check_weights
from clipsae.sae.registry import OBJECTIVES

FIXED = [1 / 32, 1 / 16, 1 / 8, 1 / 4]
DRAWN = 10


@OBJECTIVES.register("prefixes")
class Prefixes(Nested):
    """Losses of the reconstructions by prefixes of the dictionary.

    Args:
        latents: M.
        prefixes: None: of the whole alone; "fixed": 1/32, 1/16, 1/8, 1/4 of M, and M; "drawn": see
            above; or a list of sizes (whole numbers up to M) and shares (of M, up to 1.0),
            ascending, to which M is added where it is not the last.
        prefix_weights: None: all equal; or a number for each prefix, that of the whole the last.
        n_prefixes: how many are drawn, with the whole.
    """

    draw: Tensor

    def __init__(
        self,
        latents: int,
        *,
        prefixes: str | list[float] | None = None,
        prefix_weights: list[float] | None = None,
        n_prefixes: int = DRAWN,
    ) -> None:
        super().__init__()
        self.latents = latents
        self.drawn = prefixes == "drawn"
        if self.drawn:
            whole("n_prefixes", n_prefixes, most=latents, most_name="latents")
            self.count = n_prefixes
            # The seed of this step's draw, here and on the host, where it is read once only.
            self.register_buffer("draw", torch.randint(2**62, ()))
            self._draw: int | None = None
        elif n_prefixes != DRAWN:
            raise ValueError(f"n_prefixes={n_prefixes} does nothing with prefixes={prefixes!r}")
        else:
            self.sizes = _sizes(prefixes, latents)
            self.count = len(self.sizes)
        given = [1.0] * self.count if prefix_weights is None else prefix_weights
        self.weights = check_weights("prefix_weights", given, "prefixes", self.count, "null")

    def step_sizes(self) -> list[int]:
        """The prefixes of this step, ascending."""
        return drawn_sizes(self.latents, self.count, self._seed()) if self.drawn else self.sizes

    def parts(self, codes: Tensor | SparseCodes, architecture: Architecture) -> Tensor:
        sizes = self.step_sizes()
        if isinstance(codes, SparseCodes):
            return architecture.combine(codes.in_parts(codes.latent, sizes[:-1]))
        return architecture.combine_parts(codes, [b - a for a, b in pairwise([0, *sizes])])

    def after_step(self) -> None:
        if self.drawn:
            self._draw = self._seed() + 1
            self.draw += 1

    def _seed(self) -> int:
        if self._draw is None:
            self._draw = int(self.draw)
        return self._draw

    def _load_from_state_dict(self, *state: Any) -> None:
        super()._load_from_state_dict(*state)
        self._draw = None


def _sizes(prefixes: Any, latents: int) -> list[int]:
    given = FIXED if prefixes == "fixed" else prefixes

    def fits(n: Any) -> bool:
        return 1 <= n <= latents if is_whole(n) else is_number(n) and 0 < n <= 1

    if not isinstance(given, list | tuple) or not given or not all(map(fits, given)):
        raise ValueError(
            f"prefixes={prefixes!r}: expected fixed, drawn, or a list of sizes from 1 to latents="
            f"{latents} and shares up to 1.0"
        )
    sizes = [int(n) if is_whole(n) else max(1, round(n * latents)) for n in given]
    if prefixes == "fixed":
        sizes = sorted(set(sizes))  # of a few latents
    if sizes[-1] != latents:
        sizes.append(latents)
    if any(a >= b for a, b in pairwise(sizes)):
        raise ValueError(f"prefixes={prefixes!r}: expected them to ascend, here {sizes}")
    return sizes


def drawn_sizes(latents: int, count: int, seed: int) -> list[int]:
    """`count` prefixes of M latents, the last one M, drawn by a truncated Pareto distribution.

    Args:
        count: from 1 to M.
        seed: of the draw.
    """
    root = torch.arange(1, latents, dtype=torch.float64).rsqrt()
    # P(1) would be 0, and with it M prefixes impossible.
    chance = torch.cat([1 - root[:1], root[:-1] - root[1:]]).clamp(min=1e-12)
    generator = torch.Generator().manual_seed(seed)
    if count == 1:
        return [latents]
    drawn = torch.multinomial(chance, count - 1, replacement=False, generator=generator)
    return [*sorted((drawn + 1).tolist()), latents]

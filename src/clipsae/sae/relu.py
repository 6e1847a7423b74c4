"""ReLU with an l1 penalty: z = relu(s), loss + l1_coefficient * sum(z).

Bricken et al., "Towards Monosemanticity", 2023; PatchSAE (Lim et al., ICLR 2025), whose form and
scale this is. The penalty may be annealed: `Penalized`.
"""

from typing import Any

import torch
from torch import Tensor

from clipsae.sae.base import Activation, LossInputs
from clipsae.sae.checks import fraction, not_negative, whole
from clipsae.sae.codes import SparseCodes
from clipsae.sae.dense import at_least_float32, elementwise
from clipsae.sae.engine.reference import Chosen
from clipsae.sae.losses import summed
from clipsae.sae.registry import ACTIVATIONS
from clipsae.sae.sparse_ops import positions_above


class Penalized(Activation):
    """Codes >= 0 with a penalty: weight * mean over tokens of sum_m z_m^p; of ReLU and Gated.

    Where decoder rows are not kept at unit norm, z_m is multiplied by its row's norm: otherwise
    the penalty is escaped by small codes and long rows.

    p is 1, or falls to `p_end` as the training goes on (p-annealing: Karvonen et al., "Measuring
    Progress in Dictionary Learning for Language Model Interpretability with Board Game Models",
    2024, arXiv 2408.00113): the lower p, the less are large codes shrunk, and the nearer is the
    penalty to the number of active latents. With each change of p the weight is multiplied by the
    batch's sum of z^p with the p before and divided by that with the new one, so that the penalty
    keeps its size. (In the paper p changes a few times, and the sums are of some batches.)

    As the slope of z^p has no bound at 0, z^p is (z + e)^p - e^p, with e a hundredth of the batch's
    mean active code.

    Args:
        latents: M.
        l1_coefficient: the weight, at p = 1.
        p_end: p at the training's last step, above 0; 1: not annealed.
        p_start_step: the step up to which p is 1; from there it falls linearly.
    """

    own_thresholds = True
    penalties = ("l1",)
    power: Tensor
    growth: Tensor

    def __init__(
        self,
        latents: int,
        *,
        l1_coefficient: float = 8e-5,
        p_end: float = 1.0,
        p_start_step: int = 0,
    ) -> None:
        super().__init__(latents)
        not_negative("l1_coefficient", l1_coefficient)
        fraction("p_end", p_end, "a number above 0, up to 1", zero=False, one=True)
        whole("p_start_step", p_start_step, least=0)
        self.l1_coefficient = l1_coefficient
        self.p_end = p_end
        self.p_start_step = p_start_step
        if p_end != 1:
            if not l1_coefficient:
                raise ValueError(f"p_end={p_end} does nothing with l1_coefficient=0: leave out one")
            self.register_buffer("power", torch.ones(2))  # p of the batch before, and of this one
            self.register_buffer("growth", torch.ones(()))  # of the weight
            self.full_precision = (*self.full_precision, "power", "growth")
        elif p_start_step:
            raise ValueError(
                f"p_start_step={p_start_step} does nothing with p_end=1: set both or neither"
            )

    @torch.no_grad()
    def before_step(self, step: int, max_steps: int) -> None:
        if self.p_end != 1:
            self.power[0] = self.power[1]
            self.power[1] = annealed_power(self.p_end, self.p_start_step, max_steps, step)

    def auxk_scores(self, scores: Tensor) -> Tensor:
        return scores

    def penalty(self, codes: Tensor | SparseCodes, inputs: LossInputs) -> dict[str, Tensor]:
        """The term "l1" of codes >= 0; none where its weight is 0."""
        if not self.l1_coefficient:
            return {}
        if not inputs.architecture.unit_rows:
            codes = codes * inputs.architecture.decoder_norms()
        wide = at_least_float32(inputs.x[:0]).dtype
        if self.p_end == 1:
            return {"l1": self.l1_coefficient * (codes.sum(dtype=wide) / inputs.tokens)}
        before, now = self.power
        values = codes.values if isinstance(codes, SparseCodes) else codes
        with torch.no_grad():
            e = 0.01 * codes.sum(dtype=wide) / (values != 0).sum().clamp(min=1)
            e = e.clamp(min=torch.finfo(wide).tiny)  # or the slope would be infinite
            old = elementwise(_powered, codes, before, e).sum(dtype=wide)
        total = elementwise(_powered, codes, now, e).sum(dtype=wide)
        with torch.no_grad():
            old, new = summed(torch.stack((old, total)), self.world_size)
            self.growth *= torch.where((old > 0) & (new > 0), old / new, 1)
        return {"l1": self.l1_coefficient * self.growth * (total / inputs.tokens)}


def _powered(codes: Tensor, power: Tensor, e: Tensor) -> Tensor:
    return ((at_least_float32(codes) + e).pow(power) - e.pow(power)).to(codes.dtype)


def annealed_power(p_end: float, p_start_step: int, max_steps: int, step: int) -> float:
    """p of a step: 1 up to `p_start_step`, then linearly down to `p_end` at the last one.

    Args:
        max_steps: of the training.
        step: steps taken before this one.
    """
    if step <= p_start_step:
        return 1.0
    done = (step - p_start_step) / max(1, max_steps - 1 - p_start_step)
    return 1 - (1 - p_end) * min(done, 1.0)


@ACTIVATIONS.register("relu")
class ReLU(Penalized):
    """z = relu(s).

    Args:
        latents: M.
        options: the penalty's, see `Penalized`.
    """

    def __init__(self, latents: int, **options: Any) -> None:
        super().__init__(latents, **options)

    def threshold(self, scores: Tensor) -> Tensor:
        return scores.new_zeros(())

    def support(self, scores: Tensor) -> Chosen:
        return positions_above(scores, scores.new_zeros(()))

    def forward(self, scores: Tensor | SparseCodes) -> Tensor | SparseCodes:
        return elementwise(torch.relu, scores)

    def losses(self, inputs: LossInputs) -> dict[str, Tensor]:
        return self.penalty(inputs.codes, inputs)

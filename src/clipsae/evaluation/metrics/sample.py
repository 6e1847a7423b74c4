"""A sample of codes, kept sparse over a pass: for metrics that need the codes themselves.

N rows (tokens, patches or images), M latents, p pairs of a row and a latent.
"""

import logging
import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from clipsae.evaluation.floors import RandomDirections
from clipsae.evaluation.metrics.base import Measurement, Options
from clipsae.evaluation.passes import Batch
from clipsae.sae import SAE, SparseCodes

log = logging.getLogger(__name__)


class Draw:
    """Which of all rows are drawn.

    Args:
        images, each: how many images there are, and rows of an image.
        size: how many rows are drawn; all where there are no more.
    """

    def __init__(self, images: int, each: int, size: int, seed: int) -> None:
        total = images * each
        drawn = random.Random(seed).sample(range(total), min(size, total))
        self.each = each
        self.drawn = torch.tensor(sorted(drawn), dtype=torch.long)

    def among(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """The drawn rows of images at `positions` [B] in the dataset: LongTensor [n], places among
        the B * each rows, and their numbers among all drawn rows."""
        rows = (positions[:, None] * self.each + torch.arange(self.each)).flatten()
        numbers = torch.searchsorted(self.drawn, rows)
        found = (torch.searchsorted(self.drawn, rows, right=True) > numbers).nonzero()[:, 0]
        return found, numbers[found]


class WithFloors(Measurement):
    """A measurement on a sample of the images that is made of others, too, when the pass is over:
    of a probe, of random directions and of an untrained SAE.

    Attributes:
        draw: the sample.
        floors: `Batch.floors`; empty in a process without images of the sample.
    """

    def __init__(self, sae: SAE, options: Options) -> None:
        super().__init__(sae, options)
        self.draw = Draw(options.images, 1, options.sample_images, options.seed)
        self.floors: dict[str, RandomDirections | SAE] = {}
        self._once: Callable[[Any, Callable[[], Any]], Any] = lambda key, make: make()

    def drawn(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The images of a batch that are in the sample, as `Draw.among` has them."""
        rows, numbers = self.draw.among(batch.positions)
        if len(rows):
            self.floors, self._once = batch.floors, batch.images.stream.once
        return rows, numbers

    def others(
        self, key: tuple[str, int], probe: Callable[[], Any], floor: Callable[[str], Any]
    ) -> dict[str, Any]:
        """What the measurement is of the others, by name.

        Args:
            key: the same for SAEs of which the probe's and the random directions' is the same.
            probe: makes the probe's.
            floor: makes that of a name in `floors`.
        """
        found = {"probe": self._once((*key, "probe"), probe)}
        if self.floors:
            found["random"] = self._once((*key, "random"), lambda: floor("random"))
            found["untrained"] = floor("untrained")
        return found


class CodeSample(Metric):
    """Rows of codes and a vector beside each, sorted by the rows' numbers: the order in which they
    come, and the process, do not matter.

    Memory is 12 bytes a pair, and bounded: while there are too many, every second row is dropped,
    and of later rows, too, by a hash of a row's number. Unless rows are dropped the result is that
    of one process that sees all.

    Args:
        metric, unit: for the log, such as "CKNNA", "tokens".
        latents: M.
        beside: what is kept beside each row, an empty tensor [0, columns].
        too_many: (rows, pairs) -> whether they are more than can be held or compared in time.

    Attributes:
        compared: after `compute`, the number of rows where some were dropped, else None.
    """

    full_state_update = False
    compared: int | None = None
    halvings: Tensor
    seen: Tensor
    numbers: list[Tensor]
    beside: list[Tensor]
    positions: list[Tensor]  # number of the row * M + latent
    values: list[Tensor]

    def __init__(
        self,
        metric: str,
        unit: str,
        latents: int,
        beside: Tensor,
        too_many: Callable[[int, int], bool],
    ) -> None:
        super().__init__()
        self.metric, self.unit, self.latents, self.too_many = metric, unit, latents, too_many
        nothing = torch.empty(0, dtype=torch.long)
        self._empty = {"numbers": nothing, "beside": beside, "positions": nothing}
        self._empty["values"] = torch.empty(0)
        for name in self._empty:
            self.add_state(name, [], dist_reduce_fx="cat")
        self.add_state("seen", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")
        self.add_state("halvings", torch.zeros((), dtype=torch.long), dist_reduce_fx="max")
        self._start()

    def reset(self) -> None:
        super().reset()
        self._start()

    def _start(self) -> None:
        # A process without rows takes part in the gathering, with the right shapes.
        for name, empty in self._empty.items():
            setattr(self, name, [empty.to(self.device)])

    def update(self, numbers: Tensor, beside: Tensor, codes: SparseCodes) -> None:
        """Add rows: their numbers [n], what is beside them [n, columns], codes [n, M]."""
        self.seen += len(numbers)
        numbers = numbers.to(codes.values.device)
        kept = self._kept(numbers)
        codes = codes[kept].nonzero()
        self.numbers.append(numbers[kept])
        self.beside.append(beside[kept].detach().to(self._empty["beside"].dtype))
        self.positions.append(numbers[kept][codes.token] * self.latents + codes.latent)
        self.values.append(codes.values.float())
        while self._sizes()[0] > 1 and self.too_many(*self._sizes()):
            self.halvings += 1
            for name, part in zip(self._empty, self._all(), strict=True):
                setattr(self, name, [part])

    def compute(self) -> tuple[Tensor, SparseCodes]:
        """What is beside the rows, [N, columns], and their codes [N, M]."""
        numbers, beside, positions, values = self._all()
        numbers, order = numbers.sort()
        positions, ascending = positions.sort()
        row = torch.searchsorted(numbers, positions // self.latents)
        codes = SparseCodes(
            values[ascending],
            row * self.latents + positions % self.latents,
            (len(numbers), self.latents),
        )
        if self.halvings:
            self.compared = len(numbers)
            each = f"with {len(values) / max(1, len(numbers)):,.0f} active latents each, "
            log.info(
                "%s compares %s of %s %s, drawn at random: %sall would take too long, or too much "
                "memory",
                self.metric,
                f"{len(numbers):,}",
                f"{int(self.seen):,}",
                self.unit,
                each if len(values) else "",
            )
        return beside[order], codes

    def _kept(self, numbers: Tensor) -> Tensor:
        return _hash(numbers) < 2**31 >> int(self.halvings)

    def _sizes(self) -> tuple[int, int]:
        return sum(map(len, self.numbers)), sum(map(len, self.values))

    def _all(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The states, each as one tensor, without the rows that are dropped by now."""
        numbers, beside, positions, values = (dim_zero_cat(getattr(self, n)) for n in self._empty)
        rows, pairs = self._kept(numbers), self._kept(positions // self.latents)
        return numbers[rows], beside[rows], positions[pairs], values[pairs]


def _hash(numbers: Tensor) -> Tensor:
    """A pseudorandom number below 2^31 for each number."""
    x = numbers + 1
    for shift, factor in ((16, 0x45D9F3B), (16, 0x45D9F3B)):  # an integer hash of 32 bits
        x = ((x >> shift) ^ x) * factor & 0xFFFFFFFF
    return ((x >> 16) ^ x) >> 1

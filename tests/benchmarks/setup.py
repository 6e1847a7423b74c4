"""What all measurements share: sizes, the device, a clock, and pairs that take turns."""

import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

Step = Callable[[], object]


@dataclass(frozen=True)
class Sizes:
    """How large everything is; the defaults are the paper's, on ViT-B/16.

    Attributes:
        d: width.  latents: M.  tokens: of a step.  rounds: repetitions of a pair.
        step_rows: recipes and densities (None: as initialised) of the table of steps.
        memory_rows: the same for peak memory, and memory_tokens: of a step there.
        grow: what a step's cost is measured against, and the values.
        clip: name and weights.  images: of the evaluation.  cache_images: of the cache.
        workers: numbers of processes that decode images.
    """

    d: int = 768
    latents: int = 49152
    tokens: int = 512
    rounds: int = 5
    step_rows: tuple[tuple[str, float | None], ...] = (
        ("relu", None),
        ("relu", 0.02),
        ("jumprelu", None),
        ("jumprelu", 0.02),
        ("gated", None),
        ("gated", 0.02),
        ("topk", None),
        ("batch_topk", None),
        ("sparsemax", 0.007),
        ("sparsemax", 0.021),
        ("attention_relu", 0.02),
        ("linear_sparsemax", 0.021),
    )
    memory_rows: tuple[tuple[str, float | None], ...] = (
        ("relu", None),
        ("relu", 0.11),  # nearly the most that is held sparse
        ("jumprelu", None),
        ("gated", None),
        ("topk", None),
        ("batch_topk", None),
        ("sparsemax", 0.021),
        ("attention_relu", None),
        ("linear_sparsemax", 0.021),
    )
    memory_tokens: int = 6304
    grow: Mapping[str, tuple] = None  # type: ignore[assignment] # set below
    clip: tuple[str, str | None] = ("ViT-B-16-quickgelu", None)
    images: int = 16
    ns: tuple[int, ...] = (1, 5, 10, 50)
    cache_images: int = 1024
    workers: tuple[int, ...] = (0, 2)

    def __post_init__(self) -> None:
        if self.grow is None:
            object.__setattr__(self, "grow", _GROW)


_GROW = {
    "latents": tuple(2**i for i in range(12, 18)),
    "tokens": (128, 512, 2048),
    "k": (8, 32, 128, 512),
    "support": (0.002, 0.007, 0.021, 0.06),
}

QUICK = Sizes(
    d=32,
    latents=512,
    tokens=64,
    rounds=1,
    step_rows=(("relu", None), ("sparsemax", 0.02)),
    memory_rows=(("topk", None),),
    memory_tokens=128,
    grow={"latents": (512, 1024), "tokens": (32, 64), "k": (4, 8), "support": (0.01, 0.05)},
    clip=("clipsae-tiny", "builtin"),
    images=4,
    ns=(1, 5),
    cache_images=64,
    workers=(0,),
)


@dataclass(frozen=True)
class Setup:
    """One measurement's circumstances.

    Attributes:
        device: "cpu" or "cuda".  bf16: products under autocast in bfloat16.
        images: a folder of photos; None: random pixels.
    """

    sizes: Sizes
    threads: int
    seed: int = 0
    device: str = "cpu"
    bf16: bool = False
    images: Path | None = None

    @property
    def clock_name(self) -> str:
        if self.device != "cpu":
            return "wall clock, the device synchronised"
        return "CPU time of the process" if self.threads == 1 else "wall clock"

    def clock(self) -> float:
        """Seconds. With one thread those that the process was given, whoever else computes."""
        if self.device != "cpu":
            torch.cuda.synchronize()
        return time.process_time() if "CPU time" in self.clock_name else time.perf_counter()

    def precision(self) -> AbstractContextManager[Any]:
        """For forward passes."""
        return torch.autocast(self.device, torch.bfloat16) if self.bf16 else nullcontext()

    def seconds(self, step: Step) -> float:
        """Of one call."""
        start = self.clock()
        step()
        return self.clock() - start

    def interleaved(self, steps: Mapping[str, Step]) -> dict[str, list[float]]:
        """Seconds of each in each round; they take turns, after one round that is not counted."""
        for step in steps.values():
            step()
        found: dict[str, list[float]] = {name: [] for name in steps}
        for _ in range(self.sizes.rounds):
            for name, step in steps.items():
                found[name].append(self.seconds(step))
        return found


def ratio(times: list[float], base: list[float]) -> float:
    """The median of the pairs' ratios."""
    return statistics.median(a / b for a, b in zip(times, base, strict=True))

"""How fast the operations and whole steps are, as functions of a device and of sizes.

N tokens, M latents, d width, p pairs of a token and a latent that have a code.
"""

import importlib.util
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch

from clipsae.sae import SparseCodes
from clipsae.sae.engine import backend
from clipsae.sae.engine.gpu import PaddedCodes
from tests.benchmarks.setup import Setup, Step, options_of, prepared, switched
from tests.benchmarks.steps import SAELENS, ours, peak, product, saelens

WARM_UP, ROUNDS = 3, 10


def milliseconds(step: Step, device: str) -> float:
    """The median of some runs in a row, after some that compile."""
    for _ in range(WARM_UP):
        step()
    if device == "cpu":
        times = [time.perf_counter()]
        for _ in range(ROUNDS):
            step()
            times.append(time.perf_counter())
        return 1e3 * statistics.median(end - begin for begin, end in pairwise(times))
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(ROUNDS + 1)]
    # Some 30 ms in which the host gets ahead: what it needs to launch kernels is not timed.
    torch.cuda._sleep(50_000_000)
    marks[0].record()
    for mark in marks[1:]:
        step()
        mark.record()
    torch.cuda.synchronize()
    return statistics.median(begin.elapsed_time(end) for begin, end in pairwise(marks))


def bandwidth(device: str, megabytes: int = 1024) -> float:
    """GB (10^9 bytes) a second that a large copy reads and writes: the most that a kernel can."""
    source = torch.ones(megabytes * 250_000, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / milliseconds(lambda: target.copy_(source), device) / 1e6


@dataclass(frozen=True)
class Timed:
    """An operation: its bytes as its algorithm moves them, each counted once, and its time."""

    name: str
    pairs: int
    gigabytes: float
    ms: float

    @property
    def rate(self) -> float:
        """GB a second."""
        return 1e3 * self.gigabytes / self.ms


def operations(setup: Setup, share: float) -> list[Timed]:
    """Each operation of the device's engine, where this share of the pairs has a code."""
    sizes, device = setup.sizes, setup.device
    n, m, d = sizes.tokens, sizes.latents, sizes.d
    generator = torch.Generator(device).manual_seed(setup.seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    scores, x, rows = normal(n, m), normal(n, d), normal(m, d)
    on, k, pairs = backend(scores), max(1, int(share * m)), int(1.5 * share * n * m) + 16
    border = scores[:64].flatten().topk(max(1, int(share * scores[:64].numel()))).values[-1]
    all_scores = 4 * n * m
    found: list[Timed] = []

    def time_of(name: str, moved: Callable[[int], float], step: Step, pairs: int) -> None:
        ms = milliseconds(step, device)
        found.append(Timed(name, pairs, moved(pairs) / 1e9, ms))

    # A list of 8 bytes a pair is written and read; a code has 4 bytes and a position 8.
    def finding(name: str, reads: int, choose: Callable[[], Any]) -> PaddedCodes:
        codes = choose()
        count = int(codes.begin[-1])
        time_of(name, lambda p: reads * all_scores + p * (2 * 8 + 12), choose, count)
        return codes

    codes = finding("find above a threshold", 1, lambda: on.above(scores, border).pack(pairs))
    finding("find the k largest of each", 2, lambda: on.largest(scores, k).pack())
    finding("find the k n largest", 2, lambda: on.largest_of_all(scores, k * n, lambda v: k * n))
    spread = _spread(scores[:64], share)
    scores.mul_(spread)
    finding("find above sparsemax's threshold", 2, lambda: on.sparsemax(scores).pack(pairs))
    scores.div_(spread)

    count, index = int(codes.begin[-1]), 4 + 8  # a value and an index of each pair
    gathered = lambda p: p * (4 * d + index)  # noqa: E731

    def fresh() -> SparseCodes:
        return PaddedCodes(codes.values, codes.positions, codes.shape, codes.begin, codes.total)

    for name, moved, step in (
        # Keys are sorted in four passes of 8 bits, each key with a number of 8 bytes.
        ("order by latent", lambda p: p * (4 * 2 * 12 + 16), lambda: fresh().lists_by_latent),
        ("mix", lambda p: gathered(p) + 4 * n * d, lambda: on.mix(codes, rows)),
        ("sample", lambda p: gathered(p) + 4 * n * d, lambda: on.sample(codes, x, rows)),
        ("accumulate", lambda p: gathered(p) + 4 * m * d, lambda: on.accumulate(codes, x)),
        ("sums of latents", lambda p: p * 12, lambda: codes.sum_tokens(codes.values)),
        ("sums of tokens", lambda p: p * 4, lambda: codes.sum_latents(codes.values)),
    ):
        time_of(name, moved, step, count)

    weight = torch.nn.Parameter(rows)
    weight.grad = torch.ones_like(rows)
    adam = torch.optim.Adam([weight], lr=1e-5, fused=True)
    # Reads a weight, its gradient and two moments, and writes all but the gradient.
    time_of("Adam's step on M x d", lambda p: 7 * 4 * m * d, adam.step, 0)
    return found


def _spread(scores: torch.Tensor, share: float) -> float:
    """What to multiply scores with for sparsemax to keep this share of them."""
    low, high = -24.0, 8.0
    for _ in range(25):
        middle = (low + high) / 2
        scaled = scores * 2**middle
        kept = (scaled > backend(scores).sparsemax_threshold(scaled)).float().mean()
        low, high = (middle, high) if kept > share else (low, middle)
    return 2**low


def product_rate(setup: Setup) -> float:
    """TFLOP/s of the dense product of all tokens and the dictionary."""
    sizes = setup.sizes
    flops = 2 * sizes.tokens * sizes.d * sizes.latents
    return flops / milliseconds(product(setup), setup.device) / 1e9


def least_ms(setup: Setup, pairs: float, parameters: int, gb_s: float, tflop_s: float) -> float:
    """A step's time, were its kernels as fast as the card's memory and its products: the scores
    (a product, written once and read twice), a row of four products for each pair, gradients
    (written, and read), Adam (see `operations`)."""
    sizes = setup.sizes
    moved = 3 * 4 * sizes.tokens * sizes.latents + 4 * 4 * pairs * sizes.d + 9 * 4 * parameters
    flops = 2 * sizes.tokens * sizes.d * sizes.latents
    return moved / gb_s / 1e6 + flops / tflop_s / 1e9


def steps(recipe: str, density: float | None, setup: Setup) -> dict[str, float]:
    """Milliseconds of whole steps: "as shipped"; "sparse" and "dense", whatever the share of active
    latents; "SAELens", where it is installed. And that share, the parameters, and the GB at most
    allocated as shipped.
    """
    options = options_of(recipe, setup.sizes.latents)
    sae, x = prepared(options, density, setup)
    parameters = sum(p.numel() for p in sae.parameters())
    with switched(setup.device, 0), torch.no_grad():
        active = sae(x).fired().sum().item() / (x.shape[1] * sae.latents)
    step = ours(sae, x, setup)

    found = {"active": active, "parameters": parameters}
    for kind, share in (("sparse", 1.25 * active), ("dense", 0)):
        with switched(setup.device, share):
            found[kind] = milliseconds(step, setup.device)
    if setup.device != "cpu":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    found["as shipped"] = milliseconds(step, setup.device)
    found["peak GB"] = peak(setup.device)
    del sae, x, step
    if recipe in SAELENS and importlib.util.find_spec("sae_lens"):
        theirs = saelens(recipe, setup)
        found["SAELens"] = milliseconds(theirs, setup.device)
    return found

"""A whole training step (forward, backward, Adam) beside the plain form of the same formula.

    python tests/benchmarks/step_table.py --tokens 512 --threads 2

One row per recipe and density. Both forms start from the same parameters and take turns; seconds
are medians, the ratio is the median of the pairs' ratios. Peak memory is the operating system's, of
a process that does these steps alone (`--memory`). Where SAELens is installed it gets a column.
"""

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from torch import Tensor

from clipsae.sae import SAE
from tests.benchmarks import peers, plain
from tests.benchmarks.recipes import recipe, set_density

ROWS = [
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
]


def ours(sae: SAE, x: Tensor) -> Callable[[], float]:
    optimizer = torch.optim.Adam(sae.parameters(), lr=1e-5, fused=True)

    def step() -> float:
        optimizer.zero_grad()
        loss = sae(x).loss
        loss.backward()
        sae.after_backward()
        optimizer.step()
        sae.after_step()
        return loss.item()

    return step


def prepared(name: str, density: float | None, args: argparse.Namespace) -> tuple[SAE, Tensor]:
    """The same SAE and tokens for the same arguments."""
    torch.manual_seed(args.seed)
    sae = recipe(name, args.d, args.latents)
    x = torch.randn(1, args.tokens, args.d) + torch.randn(args.d)
    sae.initialize(x)
    set_density(sae, x, density)
    return sae, x


def forms(name: str, density: float | None, args: argparse.Namespace) -> dict[str, Callable]:
    """Functions that build each form's step."""
    makers = {
        "ours": lambda: ours(*prepared(name, density, args)),
        "plain": lambda: plain.step(*prepared(name, density, args)),
    }
    # A library's SAE cannot be brought to our density: it is compared as it starts.
    if peers.has(name) and density is None:
        makers["SAELens"] = lambda: peers.step(name, args.d, args.latents, args.tokens)
    return makers


def timed(
    steps: dict[str, Callable[[], float]], rounds: int, clock: Callable[[], float]
) -> dict[str, list[float]]:
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for step in steps.values():
        step()
    for _ in range(rounds):
        for name, step in steps.items():
            start = clock()
            step()
            seconds[name].append(clock() - start)
    return seconds


def peak_memory(name: str, density: float | None, form: str, args: argparse.Namespace) -> float:
    """GB of a process of its own that takes two steps."""
    command = [sys.executable, __file__, "--alone", json.dumps([name, density, form])]
    for option in ("tokens", "latents", "d", "threads", "seed"):
        command += [f"--{option}", str(getattr(args, option))]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return float(out.split()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--latents", type=int, default=49152)
    parser.add_argument("--d", type=int, default=768)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--recipes", nargs="*", default=sorted({name for name, _ in ROWS}))
    parser.add_argument(
        "--cpu-time",
        action="store_true",
        help="seconds of CPU, not of the clock: for a machine that others use, with one thread",
    )
    parser.add_argument("--no-plain", action="store_true", help="time ours alone")
    parser.add_argument("--memory", action="store_true", help="peak memory, in other processes")
    parser.add_argument("--alone", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.alone:
        name, density, form = args.alone
        step = forms(name, density, args)[form]()
        step()
        step()
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)
        return
    print(
        f"{platform.processor() or platform.machine()}, {args.threads} threads, torch "
        f"{torch.__version__}, d = {args.d}, M = {args.latents}, {args.tokens} tokens, float32"
    )
    print("| recipe | active | form | seconds | tokens/s | ratio to ours | peak GB |")
    print("|---|---|---|---|---|---|---|")
    for name, density in ROWS:
        if name not in args.recipes:
            continue
        makers = forms(name, density, args)
        if args.no_plain:
            makers = {"ours": makers["ours"]}
        sae, x = prepared(name, density, args)
        active = 100 * sae(x).fired().sum().item() / (args.tokens * args.latents)
        clock = time.process_time if args.cpu_time else time.perf_counter
        seconds = timed({form: make() for form, make in makers.items()}, args.rounds, clock)
        del sae
        for form, times in seconds.items():
            middle = statistics.median(times)
            pairs = zip(times, seconds["ours"], strict=True)
            ratio = statistics.median(a / b for a, b in pairs)
            memory = f"{peak_memory(name, density, form, args):.1f}" if args.memory else ""
            print(
                f"| {name} | {active:.2f} % | {form} | {middle:.3f} | {args.tokens / middle:,.0f} "
                f"| {ratio:.2f} | {memory} |",
                flush=True,
            )


if __name__ == "__main__":
    main()

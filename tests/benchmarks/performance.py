"""Measures what a user waits for, and writes docs/performance.md and docs/performance.json; on a
GPU docs/performance-gpu.md and docs/performance-gpu.json.

    python tests/benchmarks/performance.py --threads 2 --images PHOTOS
    python tests/benchmarks/performance.py --device cuda --images PHOTOS

A part that is measured alone (`--only steps`) replaces its part of the JSON; the page is made from
the JSON.
"""

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import jinja2
import torch

from tests.benchmarks.crossing import measure_crossing
from tests.benchmarks.feeding import measure_feeding
from tests.benchmarks.passes import measure_evaluation
from tests.benchmarks.setup import GPU_ROWS, QUICK, Setup, Sizes
from tests.benchmarks.sources import measure_features
from tests.benchmarks.steps import measure_costs, measure_growth, measure_memory, measure_steps

ROOT = Path(__file__).resolve().parents[2]
SECTIONS: dict[str, Callable[[Setup, Callable[[str], None]], Any]] = {
    "steps": measure_steps,
    "costs": measure_costs,
    "crossing": measure_crossing,
    "growth": measure_growth,
    "memory": measure_memory,
    "evaluation": measure_evaluation,
    "features": measure_features,
    "feeding": measure_feeding,
}
USUAL = {
    "cpu": ("steps", "costs", "growth", "memory", "evaluation", "features"),
    "cuda": ("steps", "costs", "crossing", "growth", "memory", "evaluation", "feeding"),
}
PRECISIONS = {"cpu": ("float32",), "cuda": ("tf32", "bf16")}  # all for steps, else the first
FORMAT = 1  # of the JSON


def measured(section: str, setup: Setup) -> dict[str, Any]:
    """A section's numbers, and how they were measured."""
    precisions = PRECISIONS[setup.device][: None if section == "steps" else 1]
    load = os.getloadavg()[0]
    start = time.perf_counter()
    found = []
    for precision in precisions:
        here = replace(setup, precision=precision)
        here.apply()
        report = lambda line: print(f"{section}, {precision}: {line}", flush=True)  # noqa: E731, B023
        found.append(SECTIONS[section](here, report))
    values = found[0]
    if section == "steps":
        pairs = zip(precisions, found, strict=True)
        values = [{"precision": precision, **row} for precision, rows in pairs for row in rows]
    about = {
        "machine": _machine(setup.device),
        "threads": setup.threads,
        "clock": setup.clock_name,
        "load": [load, os.getloadavg()[0]],
        "device": setup.device,
        "dtype": " and ".join(precisions),
        "seed": setup.seed,
        "sizes": {name: getattr(setup.sizes, name) for name in ("d", "latents", "tokens")},
        "rounds": setup.sizes.rounds,
        "versions": {name: _version(name) for name in ("clipsae", "torch", "sae-lens")},
        "python": platform.python_version(),
        "date": date.today().isoformat(),
        "minutes": (time.perf_counter() - start) / 60,
    }
    return {"about": about, "values": values}


def page(content: dict[str, Any], name: str = "performance") -> str:
    """docs/NAME.md from the content of NAME.json."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["comma"] = lambda value: f"{value:,.0f}"
    environment.filters["fixed"] = lambda value, digits: f"{value:,.{digits}f}"
    return environment.get_template("performance.md.j2").render(content["sections"], name=name)


def _machine(device: str) -> str:
    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((one.split(": ")[1] for one in lines if one.startswith("model name")), cpu)
    name = f"{cpu}, {os.cpu_count()} cores"
    return name if device == "cpu" else f"{torch.cuda.get_device_name()} ({name})"


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _arguments(words: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=SECTIONS, help="some parts alone")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--tokens", type=int, help="of a step; 512, on a GPU the paper's 6,304")
    parser.add_argument("--latents", type=int, help="M; 49,152")
    parser.add_argument("--rounds", type=int, help="repetitions of each pair; 5")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--images", type=Path, help="a folder of photos; else random pixels")
    parser.add_argument("--quick", action="store_true", help="toy sizes: whether it works")
    parser.add_argument("--out", type=Path, default=ROOT / "docs", help="a folder")
    return parser.parse_args(words)


def main(words: list[str] | None = None) -> None:
    """Measure, merge, write."""
    args = _arguments(words)
    if args.device == "cuda" and not torch.cuda.is_available():
        sys.exit("--device cuda: torch finds no such device here")
    sizes = QUICK if args.quick else Sizes()
    if args.device == "cuda" and not args.quick:
        sizes = replace(sizes, tokens=sizes.memory_tokens, step_rows=GPU_ROWS)
    given = {name: getattr(args, name) for name in ("tokens", "latents", "rounds")}
    setup = Setup(
        sizes=replace(sizes, **{name: value for name, value in given.items() if value}),
        threads=args.threads,
        seed=args.seed,
        device=args.device,
        images=args.images,
    )
    args.out.mkdir(parents=True, exist_ok=True)
    name = "performance" if args.device == "cpu" else "performance-gpu"
    file = args.out / f"{name}.json"
    for section in args.only or USUAL[args.device]:
        found = measured(section, setup)
        # Read and written after each section: another run may write too, and this one be stopped.
        content = json.loads(file.read_text()) if file.exists() else {"sections": {}}
        content = {"format": FORMAT, "sections": content["sections"] | {section: found}}
        file.write_text(json.dumps(content, indent=1) + "\n")
        file.with_suffix(".md").write_text(page(json.loads(file.read_text()), name))


if __name__ == "__main__":
    main()

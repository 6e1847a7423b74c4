"""Peak memory of training steps: the operating system's number, of a process that does nothing
else."""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from tests.benchmarks.recipes import options_of
from tests.benchmarks.setup import Setup, Sizes
from tests.benchmarks.steps import ours, prepared

ROOT = Path(__file__).resolve().parents[2]
STEPS = 2  # in the first one Adam's state is made


def measure_memory(setup: Setup, report: Callable[[str], None]) -> list[dict[str, Any]]:
    """A row for each recipe: GB of whole steps (forward, backward, Adam), and their seconds."""
    rows = []
    for recipe, density in setup.sizes.memory_rows:
        sizes = setup.sizes
        question = {
            "options": options_of(recipe, sizes.latents),
            "density": density,
            "setup": {k: v for k, v in asdict(setup).items() if k not in ("sizes", "images")},
            "sizes": {"d": sizes.d, "latents": sizes.latents, "tokens": sizes.memory_tokens},
        }
        command = [sys.executable, "-c", "from tests.benchmarks.memory import alone; alone()"]
        done = subprocess.run(
            command, input=json.dumps(question), capture_output=True, text=True, cwd=ROOT
        )
        if done.returncode:
            raise RuntimeError(f"{recipe}: a process that measures memory failed:\n{done.stderr}")
        rows.append({"recipe": recipe, "tokens": sizes.memory_tokens, **json.loads(done.stdout)})
        report(f"{recipe}: {rows[-1]['peak_gb']:.2f} GB, {rows[-1]['seconds']:.1f} s a step")
    return rows


def alone() -> None:
    """What the process does: reads a question from stdin, and prints the answer."""
    question = json.load(sys.stdin)
    setup = Setup(sizes=replace(Sizes(), **question["sizes"]), **question["setup"])
    torch.set_num_threads(setup.threads)
    sae, x = prepared(question["options"], question["density"], setup)
    before = peak(setup.device)
    step = ours(sae, x, setup)
    seconds = [setup.seconds(step) for _ in range(STEPS)]
    print(
        json.dumps(
            {
                "peak_gb": peak(setup.device),
                "before_gb": before,
                "seconds": seconds[-1],
                "active": sae(x).fired().sum().item() / (x.shape[1] * sae.latents),
            }
        )
    )


def peak(device: str) -> float:
    """GB (10^9 bytes) at most so far: of the device, or of this process in memory."""
    if device != "cpu":
        return torch.cuda.max_memory_allocated() / 1e9
    status = Path("/proc/self/status")
    if status.exists():
        # Not `ru_maxrss`, which begins with the peak of the process that started this one.
        (line,) = (one for one in status.read_text().splitlines() if one.startswith("VmHWM"))
        return int(line.split()[1]) * 1024 / 1e9
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9

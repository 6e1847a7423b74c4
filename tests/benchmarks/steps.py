"""A whole training step (forward, backward, Adam) beside the plain form of the same formula and
SAELens's; how its cost grows; its peak memory.

All start from the same parameters and take turns: seconds are medians, ratios medians of pairs.
`product` is the dense product of tokens and dictionary that every step needs at least once.
"""

import importlib.util
import json
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clipsae.sae import SAE
from clipsae.sae.dense import empty
from tests.benchmarks import plain
from tests.benchmarks.setup import Setup, Sizes, Step, options_of, prepared, ratio

ROOT = Path(__file__).resolve().parents[2]
MEMORY_STEPS = 2  # the first one allocates Adam's state
SAELENS = {
    "relu": "standard",
    "jumprelu": "jumprelu",
    "gated": "gated",
    "topk": "topk",
    "batch_topk": "batchtopk",
}

Row = dict[str, Any]


def training_step(sae: SAE, setup: Setup) -> Callable[[Tensor], None]:
    """Our training step of an SAE, a function of tokens [..., d]."""
    optimizer = torch.optim.Adam(sae.parameters(), lr=1e-5, fused=True)

    def step(x: Tensor) -> None:
        optimizer.zero_grad()
        with setup.autocast():
            loss = sae(x).loss
        loss.backward()
        sae.after_backward()
        optimizer.step()
        sae.after_step()

    return step


def ours(sae: SAE, x: Tensor, setup: Setup) -> Step:
    """The same on tokens x [1, N, d]."""
    return partial(training_step(sae, setup), x)


def product(setup: Setup) -> Step:
    """Scores of tokens [N, d] and a dictionary [M, d], in memory that was written before."""
    sizes = setup.sizes
    dtype = torch.bfloat16 if setup.precision == "bf16" else torch.float32
    x = torch.randn(sizes.tokens, sizes.d, device=setup.device, dtype=dtype)
    rows = torch.randn(sizes.latents, sizes.d, device=setup.device, dtype=dtype)
    out = empty(sizes.tokens, sizes.latents, like=x)
    return lambda: torch.mm(x, rows.T, out=out)


def saelens(recipe: str, setup: Setup) -> Step:
    """SAELens's training step with Adam on random tokens [N, d], its SAE as initialised: its cost
    does not depend on the number of active latents."""
    from sae_lens.registry import get_sae_training_class
    from sae_lens.saes.sae import TrainStepInput

    sae_class, config_class = get_sae_training_class(SAELENS[recipe])
    options = {"k": 32} if "topk" in recipe else {}
    d, sizes = setup.sizes.d, setup.sizes
    config = config_class(d_in=d, d_sae=sizes.latents, device=setup.device, **options)
    sae = sae_class(config)
    x = (torch.randn(sizes.tokens, d) + torch.randn(d)).to(setup.device)
    optimizer = torch.optim.Adam(sae.parameters(), lr=1e-5)
    coefficients = dict.fromkeys(sae.get_coefficients(), 0.0001)

    inputs = TrainStepInput(
        sae_in=x,
        coefficients=coefficients,
        dead_neuron_mask=None,
        n_training_steps=0,
        is_logging_step=False,
    )

    def step() -> None:
        optimizer.zero_grad()
        with setup.autocast():
            loss = sae.training_forward_pass(inputs).loss
        loss.backward()
        optimizer.step()

    return step


def measure_steps(setup: Setup, report: Callable[[str], None]) -> list[Row]:
    """A row for each recipe and density, with seconds and ratios to ours of all forms."""
    rows = []
    sizes = setup.sizes
    for name, density in sizes.step_rows:
        options = options_of(name, sizes.latents)
        sae, x = prepared(options, density, setup)
        with torch.no_grad():
            active = sae(x).fired().sum().item() / (sizes.tokens * sizes.latents)
        forms = {
            "ours": ours(sae, x, setup),
            "plain": plain.step(*prepared(options, density, setup), setup.autocast),
            "product": product(setup),
        }
        del sae
        if name in SAELENS and importlib.util.find_spec("sae_lens"):
            forms["saelens"] = saelens(name, setup)
        times = setup.interleaved(forms)
        rows.append({"recipe": name, "as initialised": density is None, "active": active})
        for form, seconds in times.items():
            rows[-1][form] = row_of(seconds, times["ours"], sizes.tokens)
        report(f"{name} {100 * active:.2f} %: {_said(rows[-1])}")
    return rows


def measure_costs(setup: Setup, report: Callable[[str], None]) -> list[Row]:
    """A row for each variant: our step with about as many active latents as TopK has, in turns with
    TopK's on the same tokens."""
    rows = []
    sizes = setup.sizes
    for name, changes in sizes.cost_rows:
        topk = options_of("topk", sizes.latents)
        options = {**options_of(name, sizes.latents), **changes}
        of_topk = ours(*prepared(topk, None, setup), setup)
        sae, x = prepared(options, topk["k"] / sizes.latents, setup)
        with torch.no_grad():
            l0 = sae(x).fired().sum().item() / sizes.tokens
        times = setup.interleaved({"ours": ours(sae, x, setup), "topk": of_topk})
        del sae, of_topk
        said = ", ".join(f"`{option}={value}`" for option, value in changes.items())
        row = {"recipe": f"{name}, {said}" if said else name, "l0": l0}
        row["ours"] = row_of(times["ours"], times["topk"], sizes.tokens)
        row["topk"] = row_of(times["topk"], times["topk"], sizes.tokens)
        rows.append(row)
        report(f"{row['recipe']}, L0 {l0:.1f}: {_said(row)}")
    return rows


def measure_growth(setup: Setup, report: Callable[[str], None]) -> list[Row]:
    """Our step beside its dense product as M, tokens and active latents grow."""
    rows = []
    for what, values in setup.sizes.grow.items():
        for recipe in ("topk", "sparsemax"):
            if (what, recipe) in (("k", "sparsemax"), ("support", "topk")):
                continue
            for value in values:
                density = None if recipe == "topk" else 0.01
                changes: dict[str, Any] = {}
                sizes = setup.sizes
                if what == "k":
                    changes["k"] = value
                elif what == "support":
                    density = value
                else:
                    sizes = replace(sizes, **{what: value})
                here = replace(setup, sizes=sizes)
                options = options_of(recipe, sizes.latents) | changes
                sae, x = prepared(options, density, here)
                times = here.interleaved({"ours": ours(sae, x, here), "product": product(here)})
                with torch.no_grad():
                    active = sae(x).fired().sum().item() / (sizes.tokens * sizes.latents)
                del sae
                row = {"of": what, "recipe": recipe, "value": value, "active": active}
                for form, seconds in times.items():
                    row[form] = row_of(seconds, times["ours"], sizes.tokens)
                rows.append(row)
                report(f"{recipe}, {what} = {value}: {_said(row)}")
    return rows


def row_of(seconds: list[float], ours: list[float], tokens: int) -> Row:
    middle = statistics.median(seconds)
    return {
        "seconds": middle,
        "tokens_per_s": tokens / middle,
        "ratio": ratio(seconds, ours),
        "rounds": seconds,
    }


def _said(row: Row) -> str:
    forms = {name: of for name, of in row.items() if isinstance(of, dict)}
    return ", ".join(f"{name} {of['seconds']:.3f} s" for name, of in forms.items())


def measure_memory(setup: Setup, report: Callable[[str], None]) -> list[Row]:
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
        command = [sys.executable, "-c", "from tests.benchmarks.steps import alone; alone()"]
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
    setup.apply()
    sae, x = prepared(question["options"], question["density"], setup)
    before = peak(setup.device)
    step = ours(sae, x, setup)
    seconds = [setup.seconds(step) for _ in range(MEMORY_STEPS)]
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

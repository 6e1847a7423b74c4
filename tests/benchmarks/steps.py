"""A whole training step (forward, backward, Adam) beside the plain form of the same formula, and
beside SAELens's; how its cost grows.

All start from the same parameters and take turns: seconds are medians, ratios medians of pairs.
`product` is the one dense product of tokens and dictionary that no step can do without.
"""

import statistics
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from clipsae.sae import SAE
from clipsae.sae.dense import empty
from tests.benchmarks import peers, plain
from tests.benchmarks.recipes import options_of, set_density
from tests.benchmarks.setup import Setup, Step, ratio

Row = dict[str, Any]


def ours(sae: SAE, x: Tensor, setup: Setup) -> Step:
    """Our training step of an SAE on tokens x [1, N, d]."""
    optimizer = torch.optim.Adam(sae.parameters(), lr=1e-5, fused=True)

    def step() -> None:
        optimizer.zero_grad()
        with setup.precision():
            loss = sae(x).loss
        loss.backward()
        sae.after_backward()
        optimizer.step()
        sae.after_step()

    return step


def product(setup: Setup) -> Step:
    """Scores of tokens [N, d] and a dictionary [M, d], in memory that was written before."""
    sizes = setup.sizes
    dtype = torch.bfloat16 if setup.bf16 else torch.float32
    x = torch.randn(sizes.tokens, sizes.d, device=setup.device, dtype=dtype)
    rows = torch.randn(sizes.latents, sizes.d, device=setup.device, dtype=dtype)
    out = empty(sizes.tokens, sizes.latents, like=x)
    return lambda: torch.mm(x, rows.T, out=out)


def prepared(options: dict[str, Any], density: float | None, setup: Setup) -> tuple[SAE, Tensor]:
    """The same SAE and tokens [1, N, d] for the same arguments."""
    sizes = setup.sizes
    torch.manual_seed(setup.seed)
    with torch.device(setup.device):
        sae = SAE(d=sizes.d, **options).train()
        x = torch.randn(1, sizes.tokens, sizes.d) + torch.randn(sizes.d)
        sae.initialize(x)
        set_density(sae, x, density)
    return sae, x


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
            "plain": plain.step(*prepared(options, density, setup), setup.precision),
            "product": product(setup),
        }
        del sae
        if peers.has(name):
            forms["saelens"] = peers.step(name, setup)
        times = setup.interleaved(forms)
        rows.append({"recipe": name, "as initialised": density is None, "active": active})
        for form, seconds in times.items():
            rows[-1][form] = _row(seconds, times["ours"], sizes.tokens)
        report(f"{name} {100 * active:.2f} %: {_said(rows[-1])}")
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
                    row[form] = _row(seconds, times["ours"], sizes.tokens)
                rows.append(row)
                report(f"{recipe}, {what} = {value}: {_said(row)}")
    return rows


def _row(seconds: list[float], ours: list[float], tokens: int) -> Row:
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

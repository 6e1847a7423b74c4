"""From which share of active pairs dense products are faster: `DENSE_FROM` of
`clipsae.sae.engine.switch`, by whole ReLU steps of both kinds that take turns."""

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch

from clipsae.sae import SparseCodes
from clipsae.sae.engine.switch import dense_from
from tests.benchmarks.setup import Setup, Step, options_of, prepared, switched
from tests.benchmarks.steps import ours, row_of

ROOM = 1.25  # memory of sparse codes on a GPU, of what they take; on a CPU there is no limit


def measure_crossing(setup: Setup, report: Callable[[str], None]) -> dict[str, Any]:
    """A row for each number of tokens and share, and where both kinds are equally fast."""
    sizes = setup.sizes
    found: dict[str, Any] = {"rows": [], "crossings": []}
    for tokens in sizes.crossing_tokens:
        here = replace(setup, sizes=replace(sizes, tokens=tokens))
        rows = []
        for share in sizes.crossing_shares[setup.device]:
            sae, x = prepared(options_of("relu", sizes.latents), share, here)
            step = ours(sae, x, here)
            room = 1.0 if setup.device == "cpu" else ROOM * share
            forms = {"sparse": _within(step, here, room), "dense": _within(step, here, 0)}
            with switched(setup.device, room), torch.no_grad():
                out = sae(x)
            if not isinstance(out.encoded, SparseCodes):
                raise RuntimeError(f"more than {room} of the pairs are active")
            active = out.fired().sum().item() / (tokens * sizes.latents)
            del out
            times = here.interleaved(forms)
            rows.append({"tokens": tokens, "active": active})
            for form, seconds in times.items():
                rows[-1][form] = row_of(seconds, times["sparse"], tokens)
            report(f"{tokens} tokens, {100 * active:.2f} %: dense {rows[-1]['dense']['ratio']:.2f}")
            del sae, x, step, forms
        crossing = equal_at([(row["active"], row["dense"]["ratio"]) for row in rows])
        switch = dense_from(torch.device(setup.device), tokens)
        report(f"{tokens} tokens: equal at {crossing}; the switch is at {switch}")
        found["rows"] += rows
        found["crossings"].append({"tokens": tokens, "share": crossing, "switch": switch})
    return found


def equal_at(ratios: list[tuple[float, float]]) -> float | None:
    """The share at which dense steps take as long as sparse ones, between two of the (share, time
    of dense over sparse) on a line; None: at none of them."""
    for (low, above), (high, below) in pairwise(ratios):
        if above >= 1 > below:
            return low + (high - low) * (above - 1) / (above - below)
    return None


def _within(step: Step, setup: Setup, share: float) -> Step:
    def once() -> None:
        with switched(setup.device, share):
            step()

    return once

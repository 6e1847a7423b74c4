"""What is measured of an SAE: the paper's Tables 5 and 6, and recovery of known concepts.

A metric is one file here, with a pure function and a `Measurement` around it that adds up over a
pass (`clipsae.evaluation.passes`) or over processes, and a line in `MODULES`. Sums are float64.
"""

from importlib import import_module
from typing import Any

from clipsae.evaluation.metrics.base import METRICS, Measurement, Options

MODULES = (  # as they are shown
    *("sparsity", "cknna", "orthogonality", "monosemanticity", "recovery"),
    *("coherence", "localization", "probing", "support", "towers"),
)
for _module in MODULES:
    import_module(f"{__name__}.{_module}")

__all__ = ["METRICS", "NUMBERS", "Measurement", "Options"]


def __getattr__(name: str) -> Any:
    """`NUMBERS`: those of all metrics, of plugins, too, which are imported later."""
    if name != "NUMBERS":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return tuple(number for metric in METRICS for number in METRICS[metric].numbers)

"""Sparse autoencoders in plain torch: an architecture and an activation, chosen by name.

To read in this order: `base` (the contract), `topk` (an activation), `linear` (an architecture),
`sae` (the two together), `losses`, `objectives` (terms that
any of them can have); `codes` (the format of sparse codes), `sparse_ops` (their
products and gradients), `engine` (what computes these on a CPU and on a GPU); `dense` (memory and
blocks on a CPU).
"""

# Imported for their registration.
from clipsae.sae import (  # noqa: F401
    abs_topk,
    attention,
    batch_topk,
    gated,
    jumprelu,
    linear,
    matching_pursuit,
    objectives,
    relu,
    sparsemax,
    topk,
)
from clipsae.sae.base import Activation, Architecture, LossInputs, Objective, SAEOutput
from clipsae.sae.codes import SparseCodes
from clipsae.sae.registry import ACTIVATIONS, ARCHITECTURES, OBJECTIVES
from clipsae.sae.sae import SAE
from clipsae.sae.sparsemax import sparsemax_threshold

__all__ = [
    "ACTIVATIONS",
    "ARCHITECTURES",
    "OBJECTIVES",
    "SAE",
    "Activation",
    "Architecture",
    "LossInputs",
    "Objective",
    "SAEOutput",
    "SparseCodes",
    "sparsemax_threshold",
]

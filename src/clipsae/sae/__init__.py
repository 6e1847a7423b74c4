"""Sparse autoencoders in plain torch: an architecture and an activation, chosen by name.

To read in this order: `base` (the contract), `topk` (an activation), `linear` (an architecture),
`sae` (the two together), `losses`; `codes` (the format of sparse codes), `sparse_ops` (their
products and gradients), `engine` (what computes these on a CPU and on a GPU); `dense` (memory and
blocks on a CPU).
"""

# Imported for their registration.
from clipsae.sae import attention, batch_topk, gated, jumprelu, linear, relu, sparsemax, topk  # noqa: F401
from clipsae.sae.base import Activation, Architecture, LossInputs, SAEOutput
from clipsae.sae.codes import SparseCodes
from clipsae.sae.registry import ACTIVATIONS, ARCHITECTURES
from clipsae.sae.sae import SAE
from clipsae.sae.sparsemax import sparsemax_threshold

__all__ = [
    "ACTIVATIONS",
    "ARCHITECTURES",
    "SAE",
    "Activation",
    "Architecture",
    "LossInputs",
    "SAEOutput",
    "SparseCodes",
    "sparsemax_threshold",
]

"""The paper's Tables 5 and 6 as measurements of an SAE, and what it does not measure.

Each is a pure function on tensors and a class in the registry `METRICS` that adds up over a pass
(`clipsae.evaluation.passes`), or processes. Sums are float64. A new one: its file, which says what
its numbers are (`NUMBERS`), and its line below, in the order in which they are shown.
"""

# isort: off
from clipsae.evaluation.metrics.sparsity import Dense, Sparsity
from clipsae.evaluation.metrics.cknna import CKNNA, cknna
from clipsae.evaluation.metrics.orthogonality import Orthogonality, decoder_orthogonality
from clipsae.evaluation.metrics.monosemanticity import MonoSemanticity, monosemanticity
from clipsae.evaluation.metrics.recovery import ConceptRecovery, concept_recovery
# isort: on

from clipsae.evaluation.metrics.base import METRICS, Measurement, Options
from clipsae.evaluation.metrics.fidelity import fidelity
from clipsae.evaluation.metrics.stability import max_cosines, mean_max_cosine

# Of all metrics.
NUMBERS = tuple(number for name in METRICS for number in METRICS[name].numbers)

__all__ = [
    "CKNNA",
    "METRICS",
    "NUMBERS",
    "ConceptRecovery",
    "Dense",
    "Measurement",
    "MonoSemanticity",
    "Options",
    "Orthogonality",
    "Sparsity",
    "cknna",
    "concept_recovery",
    "decoder_orthogonality",
    "fidelity",
    "max_cosines",
    "mean_max_cosine",
    "monosemanticity",
]

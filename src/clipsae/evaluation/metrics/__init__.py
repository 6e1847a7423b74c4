"""The paper's Tables 5 and 6 as streaming metrics, and what it does not measure.

Each metric is a pure function on tensors, and where images stream in, a torchmetrics `Metric`
around it that adds up over batches and processes. `measure` runs them all over a dataset. Sums are
float64. The sums of sparsity and reconstruction are `clipsae.evaluation.sparsity`'s.
"""

from clipsae.evaluation.metrics.cknna import CKNNA, cknna
from clipsae.evaluation.metrics.cknna import NUMBERS as _CKNNA
from clipsae.evaluation.metrics.encoders import ImageEncoder, image_encoder
from clipsae.evaluation.metrics.fidelity import fidelity
from clipsae.evaluation.metrics.measure import (
    MeasureResult,
    check_measure_options,
    check_metrics,
    measure,
)
from clipsae.evaluation.metrics.monosemanticity import NUMBERS as _MONOSEMANTICITY
from clipsae.evaluation.metrics.monosemanticity import MonoSemanticity, monosemanticity, pool_codes
from clipsae.evaluation.metrics.orthogonality import NUMBERS as _ORTHOGONALITY
from clipsae.evaluation.metrics.orthogonality import decoder_orthogonality
from clipsae.evaluation.metrics.recovery import NUMBERS as _RECOVERY
from clipsae.evaluation.metrics.recovery import ConceptRecovery, concept_recovery
from clipsae.evaluation.metrics.stability import max_cosines, mean_max_cosine
from clipsae.evaluation.numbers import suffixed
from clipsae.evaluation.sparsity import NUMBERS as _SPARSITY

# Of all metrics, in the order in which they are shown.
NUMBERS = (
    *_SPARSITY,
    *suffixed(_SPARSITY, "_dense"),
    *_CKNNA,
    *_ORTHOGONALITY,
    *_MONOSEMANTICITY,
    *_RECOVERY,
)

__all__ = [
    "CKNNA",
    "NUMBERS",
    "ConceptRecovery",
    "ImageEncoder",
    "MeasureResult",
    "MonoSemanticity",
    "check_measure_options",
    "check_metrics",
    "cknna",
    "concept_recovery",
    "decoder_orthogonality",
    "fidelity",
    "image_encoder",
    "max_cosines",
    "mean_max_cosine",
    "measure",
    "monosemanticity",
    "pool_codes",
]

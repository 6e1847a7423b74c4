"""The paper's Tables 5 and 6 as streaming metrics, and what it does not measure.

Each metric is a pure function on tensors, and where images stream in, a torchmetrics `Metric`
around it that adds up over batches and processes. `measure` runs them all over a dataset. Sums are
float64. The sums of sparsity and reconstruction are `clipsae.evaluation.sparsity`'s.
"""

from clipsae.evaluation.metrics.cknna import CKNNA, cknna
from clipsae.evaluation.metrics.encoders import ImageEncoder, image_encoder
from clipsae.evaluation.metrics.fidelity import fidelity
from clipsae.evaluation.metrics.measure import (
    MeasureResult,
    check_measure_options,
    check_metrics,
    measure,
)
from clipsae.evaluation.metrics.monosemanticity import MonoSemanticity, monosemanticity, pool_codes
from clipsae.evaluation.metrics.orthogonality import DecoderOrthogonality, decoder_orthogonality
from clipsae.evaluation.metrics.recovery import ConceptRecovery, concept_recovery
from clipsae.evaluation.metrics.stability import matched_cosines, max_cosines, mean_max_cosine

__all__ = [
    "CKNNA",
    "ConceptRecovery",
    "DecoderOrthogonality",
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
    "matched_cosines",
    "max_cosines",
    "mean_max_cosine",
    "measure",
    "monosemanticity",
    "pool_codes",
]

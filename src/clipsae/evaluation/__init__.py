"""What an SAE's concepts are worth: top-n classification, sparsity, fidelity, monosemanticity."""

from clipsae.evaluation.evaluate import Evaluation, check_metrics, evaluate
from clipsae.evaluation.topn import check_topn_options

__all__ = ["Evaluation", "check_metrics", "check_topn_options", "evaluate"]

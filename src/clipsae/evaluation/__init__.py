"""What an SAE's concepts are worth: top-n classification, sparsity, reconstruction."""

from clipsae.evaluation.result import TopNResult
from clipsae.evaluation.sparsity import SparsityMetrics
from clipsae.evaluation.topn import check_topn_options, evaluate_topn

__all__ = ["SparsityMetrics", "TopNResult", "check_topn_options", "evaluate_topn"]

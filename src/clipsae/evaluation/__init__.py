"""What an SAE's concepts are worth: top-n classification, sparsity, reconstruction."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from clipsae.evaluation.result import TopNResult
    from clipsae.evaluation.sparsity import SparsityMetrics
    from clipsae.evaluation.topn import check_topn_options, evaluate_topn

__all__ = ["SparsityMetrics", "TopNResult", "check_topn_options", "evaluate_topn"]

_WHERE = {"SparsityMetrics": "sparsity", "TopNResult": "result"}


def __getattr__(name: str) -> Any:
    # `clipsae.evaluation.numbers` is read by commands that do not wait for torch.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_WHERE.get(name, 'topn')}"), name)

"""What an SAE's concepts are worth: top-n classification, sparsity, fidelity, monosemanticity."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from clipsae.evaluation.run import Evaluation, check_metrics, evaluate
    from clipsae.evaluation.topn import check_topn_options

__all__ = ["Evaluation", "check_metrics", "check_topn_options", "evaluate"]


def __getattr__(name: str) -> Any:
    # `clipsae.evaluation.numbers` is read by commands that do not wait for torch.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    module = "topn" if name == "check_topn_options" else "run"
    return getattr(import_module(f"{__name__}.{module}"), name)

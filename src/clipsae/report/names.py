"""How models, datasets and columns are called, and one colour for each model everywhere."""

import hashlib
import re
from collections.abc import Sequence

from clipsae.data.published import DATASETS
from clipsae.evaluation.numbers import SETTINGS
from clipsae.report.published import table_numbers

SIX = ("relu", "jumprelu", "gated", "topk", "batch_topk", "sparsemax")
WITH_K = ("topk", "batch_topk", "matryoshka", "abs_topk", "matching_pursuit")
ELEVEN_NAMES = tuple(table_numbers())  # in the order of the paper's tables

# Title, colour, marker. The palette of Okabe and Ito can be told apart with any kind of colour
# vision; markers differ as well.
_MODELS = {
    "relu": ("ReLU", "#0072b2", "o"),
    "jumprelu": ("JumpReLU", "#56b4e9", "s"),
    "gated": ("Gated", "#009e73", "D"),
    "topk": ("TopK", "#e69f00", "^"),
    "batch_topk": ("BatchTopK", "#cc79a7", "v"),
    "sparsemax": ("Sparsemax", "#d55e00", "*"),
    "attention_relu": ("Attention + ReLU", "#999999", "P"),
    "linear_sparsemax": ("Linear + sparsemax", "#b8a500", "X"),
    "matryoshka": ("Matryoshka", "#44aa99", "H"),
    "abs_topk": ("AbsTopK", "#aa4499", "8"),
    "matching_pursuit": ("Matching pursuit", "#332288", "1"),
    # Fitted without steps.
    "neurons": ("Raw neurons", "#8a9099", "d"),
    "pca": ("PCA", "#8a9099", "<"),
    "ica": ("ICA", "#8a9099", ">"),
    "kmeans": ("k-means", "#8a9099", "h"),
    "text": ("Text directions", "#8a9099", "p"),
    "random": ("Random directions", "#8a9099", "."),
}
_OTHERS = (("#7f5fb0", "h"), ("#8c564b", "<"), ("#5f7f3f", ">"), ("#c0508f", "d"))


def model_title(model: str) -> str:
    """As the paper writes it; a model that it does not have by its own name."""
    return _MODELS[model][0] if model in _MODELS else model


def model_order(model: str) -> tuple[int, str]:
    """Sort key of models: the paper's six, its ablation's two, others of ours; then by name."""
    known = list(_MODELS)
    return known.index(model) if model in known else len(known), model


def model_style(model: str, models: Sequence[str]) -> tuple[str, str]:
    """Colour ("#rrggbb") and matplotlib marker of a model among the `models` of a report."""
    if model in _MODELS:
        return _MODELS[model][1:]
    others = [name for name in models if name not in _MODELS]
    return _OTHERS[others.index(model) % len(_OTHERS)]


def dataset_title(dataset: str) -> str:
    """As its authors call it; one that is not of the eleven by its own name."""
    return DATASETS[dataset].about.title if dataset in DATASETS else dataset


def slug(dataset: str) -> str:
    """A dataset's name where files and anchors are named by it: letters, digits, "_", "-", "."; a
    hash keeps apart what would become the same."""
    plain = re.sub(r"[^A-Za-z0-9_.-]+", "_", dataset)
    if plain == dataset:
        return dataset
    return f"{plain}-{hashlib.sha256(dataset.encode()).hexdigest()[:6]}"


def listed(words: Sequence[str]) -> str:
    """ "a", "a and b", "a, b and c"."""
    return f"{', '.join(words[:-1])} and {words[-1]}" if len(words) > 1 else words[0]


def column_title(column: str, latents: int) -> str:
    """ "on_all" by its number, such as "on_49152"; others as they are."""
    return column.replace("_all", f"_{latents}")


def column_order(column: str) -> tuple[int, float]:
    """Sort key of "no_sae", "on_1", ..., "on_all", "off_1", ..., "self_1", ..."""
    setting, _, n = column.partition("_")
    if column == "no_sae":
        return 0, 0.0
    return list(SETTINGS).index(setting), float("inf") if n == "all" else float(n)

"""The published figures: arXiv 2604.14925, its supplement (Tables 5-17) and its ablations.

They were measured on CLIP ViT-B/16 with M = 49,152 latents and k = 32. Digits are kept as printed:
"8.2501" stays "8.2501", "10.0" stays "10.0".
"""

from functools import cache
from pathlib import Path

import pandas as pd

from clipsae.evaluation.metrics import NUMBERS

SOURCE = "arXiv 2604.14925, CLIP ViT-B/16, 49,152 latents, k = 32"
ABLATED_ON = "imagenet"
_FOLDER = Path(__file__).parent
_ALL = {"on_49152": "on_all"}  # keeps all latents


@cache
def zero_shot() -> dict[tuple[str, str, str], str]:
    """Tables 7-17: (dataset, model, column) -> accuracy in percent as printed.

    Columns: no_sae, on_1, on_5, on_10, on_50, on_all.
    """
    rows = _read("zero_shot").rename(columns=_ALL)
    return {
        (row["dataset"], row["model"], column): row[column]
        for row in rows.to_dict("records")
        for column in rows.columns.drop(["table", "dataset", "model"])
    }


@cache
def table_numbers() -> dict[str, int]:
    """Dataset -> number of its table in the paper, 7-17, in their order."""
    rows = _read("zero_shot")
    return {name: int(number) for name, number in zip(rows.dataset, rows.table, strict=True)}


@cache
def metrics() -> dict[tuple[str, str], str]:
    """Tables 5 and 6: (model, our metric's name) -> value as printed."""
    ours = {n.paper: n.key for n in NUMBERS if n.paper and not n.key.endswith("_dense")}
    return {
        (row["model"], ours[column]): row[column]
        for name in ("sparsity", "interpretability")
        for row in _read(name).to_dict("records")
        for column in row
        if column != "model"
    }


@cache
def ablation() -> dict[tuple[str, str], str]:
    """The 2 x 2 ablation on ImageNet: (model, column) -> accuracy in percent as printed.

    Columns: on_1, on_5, on_10, on_50. The two that the paper names after their parts come from
    its ablation; ReLU and the Sparsemax SAE, the other two corners, from Table 12.
    """
    return {
        (row["model"], column): row[column]
        for row in _read("ablation").to_dict("records")
        for column in row
        if column.startswith("on_")
    }


@cache
def ablation_parts() -> dict[str, tuple[str, str]]:
    """Model -> (architecture, activation) of the 2 x 2 ablation."""
    rows = _read("ablation")
    return {r.model: (r.architecture, r.activation) for r in rows.itertuples()}


def _read(name: str) -> pd.DataFrame:
    """A file of this folder, every figure as text."""
    return pd.read_csv(_FOLDER / f"{name}.csv", dtype=str, keep_default_na=False)

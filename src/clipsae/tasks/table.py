"""Results as a person reads them in a terminal."""

from collections.abc import Mapping
from pathlib import Path

import pandas as pd
from rich.console import Console
from rich.table import Table

SETTINGS = {
    "no_sae": "CLIP without an SAE",
    "on": "only the class's n latents",
    "off": "all but the class's n latents",
    "self": "only the image's own n latents (label-free)",
}


# What a line beside the table shows of a measurement: name, label, format.
MEASURED = (
    ("active", "active latents a token", ".1f"),
    ("l0", "L0", ".4f"),
    ("fvu", "FVU", ".3f"),
    ("cosine", "cosine", ".3f"),
    ("cknna", "CKNNA", ".3f"),
    ("dead_fraction", "silent latents", ".1%"),
    ("monosemanticity_mean", "MonoSemanticity mean", ".3f"),
    ("monosemanticity_max", "max", ".3f"),
    ("patch_coverage", "concepts found", ".0%"),
)


def logged_as(metric: str) -> str:
    """What a measured number is called in W&B: the share of concepts found as it is everywhere."""
    return metric.replace("_coverage", "_concepts_found")


def terminal(width: int = 110) -> Console:
    """As wide as the terminal; `width` characters where there is none."""
    return Console(width=None if Console().is_terminal else width)


def print_results(rows: pd.DataFrame, metrics: Mapping[str, float], folders: list[Path]) -> None:
    """Top-n accuracies as one table, n across, the measured numbers, and where the work lies.

    Args:
        rows: tidy rows of one evaluation (`results.csv`); empty: none was made.
        metrics: the numbers of a measurement by name; empty: none was made.
        folders: the finished ones; each lies in a folder named by its kind.
    """
    console = terminal()
    if not rows.empty:
        console.print(accuracy_table(rows))
    shown = [f"{label} {metrics[name]:{form}}" for name, label, form in MEASURED if name in metrics]
    if shown:
        console.print(", ".join(shown), highlight=False)
    for folder in folders:
        console.print(f"{folder.parent.name:<12}{folder}", soft_wrap=True, highlight=False)


def accuracy_table(rows: pd.DataFrame) -> Table:
    """Top-n accuracies, n across, of the tidy rows of one evaluation."""
    first = rows.iloc[0]
    ns = sorted({int(n) for n in rows.n.dropna()})
    k = "" if pd.isna(first.get("k")) else f" k={int(first.k)}"
    seed = f" seed={int(first.seed)}" if "seed" in first else ""
    classes = f"{int(first.classes):,}"
    if first.get("competing", first.classes) != first.classes:  # older results do not have it
        classes += f" of {int(first.competing):,}"  # chance is by those that compete
    table = Table(
        title=(
            f"{first.model}{k}{seed} on {first.dataset}: macro accuracy, % "
            f"({int(first.images):,} images, {classes} classes, {first.protocol} protocol)"
        ),
        title_justify="left",
    )
    table.add_column("setting")
    table.add_column("")
    for n in ns:
        label = f"n = {n}" if n < int(first.latents) else f"all {n}"
        table.add_column(label, justify="right")
    for setting, meaning in SETTINGS.items():
        chosen = rows[rows.setting == setting]
        if chosen.empty:
            continue
        if setting == "no_sae":
            cells = [""] * (len(ns) - 1) + [f"{chosen.accuracy.iloc[0]:.2f}"]
        else:
            by_n = {int(r.n): f"{r.accuracy:.2f}" for r in chosen.itertuples()}
            cells = [by_n.get(n, "") for n in ns]
        table.add_row(setting, meaning, *cells)
    return table

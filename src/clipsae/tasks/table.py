"""Results as a person reads them in a terminal."""

import math
from collections.abc import Mapping
from pathlib import Path

import pandas as pd
from rich.console import Console
from rich.table import Table

from clipsae.evaluation.numbers import SETTINGS


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
    if metrics:
        from clipsae.evaluation.metrics import NUMBERS  # takes seconds without torch

        shown = [
            f"{number.label} {number.shown(metrics)}"
            for number in NUMBERS
            if number.headline and not math.isnan(metrics.get(number.key, math.nan))
        ]
        console.print(", ".join(shown), highlight=False)
    for folder in folders:
        console.print(f"{folder.parent.name:<12}{folder}", soft_wrap=True, highlight=False)


def accuracy_table(rows: pd.DataFrame) -> Table:
    """Top-n accuracies, n across, of the tidy rows of one evaluation."""
    first = rows.iloc[0]
    columns = sorted({int(n) for n in rows.n.fillna(0)})  # 0: without an SAE
    k = "" if pd.isna(first.get("k")) else f" k={int(first.k)}"
    seed = f" seed={int(first.seed)}" if "seed" in first else ""
    classes = f"{int(first.classes):,}"
    if first.get("competing", first.classes) != first.classes:  # older results do not have it
        classes += f" of {int(first.competing):,}"  # chance is by those that compete
    of_ranking = first.get("ranking", "frequency")  # older results do not have it
    ranking = f", ranked by {of_ranking}" * (of_ranking != "frequency")
    table = Table(
        title=(
            f"{first.model}{k}{seed} on {first.dataset}: macro accuracy, % "
            f"({int(first.images):,} images, {classes} classes, {first.protocol} protocol{ranking})"
        ),
        title_justify="left",
    )
    table.add_column("setting")
    table.add_column("")
    for n in columns:
        label = f"n = {n}" if n < int(first.latents) else f"all {n}"
        table.add_column(label if n else "no SAE", justify="right")
    for setting, meaning in SETTINGS.items():
        chosen = rows[rows.setting == setting]
        if chosen.empty:
            continue
        by_n = {0 if pd.isna(r.n) else int(r.n): f"{r.accuracy:.2f}" for r in chosen.itertuples()}
        table.add_row(setting, meaning, *(by_n.get(n, "") for n in columns))
    return table

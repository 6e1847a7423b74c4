"""Results as a person reads them in a terminal."""

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


def print_results(rows: pd.DataFrame, *, sae: Path, evaluation: Path) -> None:
    """Top-n accuracies as one table, n across, and where the finished work lies.

    Args:
        rows: tidy rows of one evaluation (`results.csv`).
        sae, evaluation: the finished folders.
    """
    first = rows.iloc[0]
    console = Console(width=None if Console().is_terminal else 110)
    ns = sorted({int(n) for n in rows.n.dropna()})
    table = Table(
        title=(
            f"{first.model} on {first.dataset}: macro accuracy, % "
            f"({int(first.images)} images, {int(first.classes)} classes, {first.protocol} protocol)"
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
    console.print(table)
    console.print(f"SAE         {sae}", soft_wrap=True)
    console.print(f"evaluation  {evaluation}", soft_wrap=True)

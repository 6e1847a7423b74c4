"""`task=steer`: how far the latents of a trained SAE steer CLIP's zero-shot predictions, and what
else they move."""

import logging

import pandas as pd
from omegaconf import DictConfig
from rich.table import Table

from clipsae.store import Store
from clipsae.store.files import read_json
from clipsae.tasks import pictures
from clipsae.tasks.stages import steering
from clipsae.tasks.table import terminal
from clipsae.tasks.tracking import Run
from clipsae.training.logging import log_table

log = logging.getLogger(__name__)


def run(cfg: DictConfig) -> None:
    """Measure, collecting the reference images first where they are missing; print a table for each
    strength.

    Raises:
        ConfigError: an invalid option, a CLIP without texts, an SAE that is not trained yet.
    """
    store = Store(cfg.paths.output_dir)
    clip, dataset, (found,) = pictures.prepare([cfg], store, steering.check)
    cfg = found.cfg
    place = steering.make(cfg, store, clip, dataset, found)
    rows, numbers = (
        pd.read_csv(place.path / "steering.csv"),
        read_json(place.path / "steering.json"),
    )
    with Run(cfg, place, "steer") as logged:
        if not logged.has_results():
            log_table(logged.logger(), "steering", rows.to_dict("records"), numbers)
    console = terminal()
    for strength, part in rows.groupby("strength", sort=False):
        if cfg.task.rows:
            console.print(table(part, strength, cfg.task.rows))
        console.print(described(part, numbers, strength), highlight=False)
    csv = place.path / "steering.csv"
    console.print(f"steering    {csv}", soft_wrap=True, highlight=False)


def table(rows: pd.DataFrame, strength: float, n: int) -> Table:
    """The n sets that steer most at one strength."""
    what = "taken out" if strength == 0 else f"set to {strength:g} times their most"
    shown = Table(title=f"Latents {what}", title_justify="left")
    shown.add_column("latents", justify="right")
    shown.add_column("target")
    for heading in ("steerability", "95 % interval", "specificity", "flipped", "images"):
        shown.add_column(heading, justify="right")
    shown.add_column("what else moves")
    for row in rows.sort_values("low", ascending=False, kind="stable").head(n).itertuples():
        shown.add_row(
            str(row.latents),
            str(row.target),
            f"{row.steerability:.2f}",
            f"{row.low:.2f} to {row.high:.2f}",
            f"{row.specificity:.2f}",
            f"{row.flipped:.0%}",
            f"{row.images:,}",
            str(row.others),
        )
    return shown


def described(rows: pd.DataFrame, numbers: dict[str, float], strength: float) -> str:
    """What one strength does on average."""
    at = f"_at_{strength:g}"

    def both(name: str, form: str) -> str:
        own, random = (numbers.get(f"{name}{part}{at}", float("nan")) for part in ("", "_random"))
        return f"{own:{form}} (random directions {random:{form}})"

    return (
        f"strength {strength:g}: {numbers.get(f'steers{at}', float('nan')):.0%} of {len(rows):,} "
        f"steer further than 95 % of random directions ({rows.random.iloc[0]:.2f} logits); "
        f"on average steerability {both('steerability', '.2f')}, specificity "
        f"{both('specificity', '.2f')}, predictions changed {both('flipped', '.0%')}"
    )

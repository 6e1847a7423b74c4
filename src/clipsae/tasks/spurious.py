"""`task=spurious`: what the worst group wins when latents of the confounder are taken out."""

import pandas as pd
from omegaconf import DictConfig
from rich.table import Table

from clipsae.store import Store
from clipsae.store.files import read_json
from clipsae.tasks import pictures
from clipsae.tasks.stages import spurious
from clipsae.tasks.table import terminal
from clipsae.tasks.tracking import Run
from clipsae.training.logging import log_table

CLASSIFIERS = {
    "zero_shot": "zero-shot",
    "probe": "probe of the training images",
    "refit": "probe, fitted again",
}
METHODS = {
    "none": "nothing taken out",
    "name": "latents by name",
    "score": "latents by labels",
    "random": "random latents",
    "projection": "linear projection",
    "balanced": "groups of equal weight",
}


def run(cfg: DictConfig) -> None:
    """Name the latents where that is missing, take them out, print the worst group's accuracies.

    Raises:
        ConfigError: a dataset without groups, an invalid option, an SAE that is not trained yet.
    """
    store = Store(cfg.paths.output_dir)
    clip, dataset, (found,) = pictures.prepare([cfg], store, spurious.check)
    cfg = found.cfg
    place = spurious.make(cfg, store, clip, dataset, found)
    rows = pd.read_csv(place.path / "spurious.csv", keep_default_na=False)
    about = read_json(place.path / "spurious.json")
    numbers = {
        f"worst_{row.classifier}_{row.method}_{row.n}": row.worst
        for row in rows[rows.draw == 0].itertuples()
    }
    with Run(cfg, place, "spurious") as logged:
        if not logged.has_results():
            log_table(logged.logger(), "spurious", rows.to_dict("records"), numbers)
    console = terminal()
    console.print(table(rows, cfg.dataset.name))
    words = ", ".join(about["words"])
    console.print(f"by name     {len(about['named'])} latents called {words}: {about['named']}")
    csv = place.path / "spurious.csv"
    console.print(f"spurious    {csv}", soft_wrap=True, highlight=False)


def table(rows: pd.DataFrame, name: str) -> Table:
    """The worst group's accuracy and the average: a row for each method and number of latents."""
    shown = Table(
        title=f"{name}: accuracy of the worst group (of all images), %", title_justify="left"
    )
    shown.add_column("what is taken out")
    shown.add_column("latents", justify="right")
    for heading in CLASSIFIERS.values():
        shown.add_column(heading, justify="right")
    for method, said in METHODS.items():
        for n, part in rows[rows.method == method].groupby("n"):
            cells = []
            for classifier in CLASSIFIERS:
                own = part[part.classifier == classifier]
                cell = "" if own.empty else f"{own.worst.mean():.1f} ({own.average.mean():.1f})"
                if len(own) > 1:
                    cell = f"{own.worst.min():.1f} to {own.worst.max():.1f}, mean {cell}"
                cells.append(cell)
            shown.add_row(said, f"{n}" if n else "", *cells)
    return shown

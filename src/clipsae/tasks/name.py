"""`task=name`: what the latents of a trained SAE are called, and how far each name can be
trusted."""

import logging

from omegaconf import DictConfig
from rich.markup import escape
from rich.table import Table

from clipsae.naming import Names
from clipsae.store import Store
from clipsae.tasks import pictures
from clipsae.tasks.stages import names as stage
from clipsae.tasks.table import terminal
from clipsae.tasks.tracking import Run
from clipsae.training.logging import log_table

log = logging.getLogger(__name__)


def run(cfg: DictConfig) -> None:
    """Name the latents, collecting their reference images first where they are missing; print the
    table.

    Raises:
        ConfigError: an invalid option, a CLIP without texts, an SAE that is not trained yet.
    """
    store = Store(cfg.paths.output_dir)
    clip, dataset, (found,) = pictures.prepare([cfg], store, stage.check)
    cfg = found.cfg
    finished = stage.stage(cfg, store, dataset, found.pictures).finished
    place = stage.make_names(cfg, store, clip, dataset, found.pictures, found.trained)
    if finished:
        log.info("using the finished %s", place.path)
    names = Names.load(place.path)
    with Run(cfg, place, "name") as logged:
        if not (finished and logged.has_results()):
            log_table(logged.logger(), "names", names.rows(), names.numbers)
    console = terminal()
    if cfg.task.rows and names.named.any():
        console.print(table(names, cfg.task.rows))
    for line in summary(names):
        console.print(line, soft_wrap=True, highlight=False)
    console.print(f"names       {place.path / 'names.csv'}", soft_wrap=True, highlight=False)


def table(names: Names, rows: int) -> Table:
    """The named latents with the best scores."""
    shown = Table(title="Names that can be trusted most", title_justify="left")
    shown.add_column("latent", justify="right")
    shown.add_column("name")
    for heading in ("score", "95 % interval", "other names"):
        shown.add_column(heading, justify="right")
    shown.add_column("next words")
    low = names.low.where(names.named, -1.0)
    for latent in low.argsort(descending=True, stable=True)[:rows].tolist():
        if low[latent] < 0:
            break
        shown.add_row(
            f"{latent:,}",
            escape(names.text[latent]),
            f"{names.score[latent]:.3f}",
            f"{names.low[latent]:.3f} to {names.high[latent]:.3f}",
            f"{names.control[latent]:.3f}",
            escape(
                ", ".join([word for word in names.words(latent) if word != names.text[latent]][:3])
            ),
        )
    return shown


def summary(names: Names) -> list[str]:
    """What the names are worth as a whole, in a few lines."""
    said = sum(map(bool, names.text))
    score = names.score[names.score.isfinite()].double()
    control = names.control[names.control.isfinite()].double()
    lines = [
        f"named       {int(names.named.sum()):,} of {len(names):,} latents, {said:,} have a word; "
        f"no name below {names.threshold:.3f}, which 5 % of other latents' names reach",
    ]
    if len(score):
        lines.append(
            f"score       {score.mean():.3f} on average, judged by {names.judge}; with other "
            f"latents' names {control.mean():.3f}"
        )
    if "right" in names.numbers:
        numbers = names.numbers
        lines.append(
            f"right       {numbers['right']:.1%} of {numbers['concepts']:.0f} concepts have their "
            f"name on their best latent (names shuffled {numbers['right_shuffled']:.1%}, named by "
            f"the truth {numbers['right_oracle']:.1%})"
        )
    return lines

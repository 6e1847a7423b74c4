"""`task=data`: which of the published datasets exist, and whether their sizes are as published."""

import logging
from dataclasses import dataclass, field
from pathlib import Path

from omegaconf import DictConfig
from rich.progress import track
from rich.table import Table

from clipsae.data.published import DATASETS, PublishedDataset
from clipsae.errors import ConfigError
from clipsae.tasks.table import terminal

SPLITS = ("train", "test")


@dataclass
class Survey:
    """What was found of one dataset.

    Attributes:
        home: the folder it was found in, or None.
        splits: what could be read.
        problems: a sentence each for what could not be read or is not as published.
    """

    home: Path | None = None
    splits: dict[str, PublishedDataset] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


def run(cfg: DictConfig) -> None:
    """Print the table, then a sentence for each problem.

    Raises:
        ConfigError: `task.datasets` names one that does not exist.
    """
    names = list(cfg.task.datasets or DATASETS)
    unknown = [name for name in names if name not in DATASETS]
    if unknown:
        raise ConfigError(
            f"task.datasets has {unknown[0]!r}: expected names among {', '.join(DATASETS)}"
        )
    folder = Path(cfg.paths.data_dir).expanduser()
    console = terminal()
    logger = logging.getLogger("clipsae.data.published")
    level = logger.level
    logger.setLevel(logging.ERROR)  # the table says the same
    try:
        progress = track(names, "reading the lists", console=console, transient=True)
        surveys = {name: survey(name, folder) for name in progress}
    finally:
        logger.setLevel(level)
    console.print(table(surveys, folder))
    for name, found in surveys.items():
        for problem in found.problems:
            console.print(f"{name}: {problem}", soft_wrap=True, markup=False, highlight=False)


def survey(name: str, folder: Path) -> Survey:
    """Read the lists of both splits of one dataset; no image is opened.

    Args:
        name: one of `DATASETS`.
        folder: the folder of all datasets.
    """
    cls = DATASETS[name]
    place = cls.find(folder / name)
    if place is None:
        return Survey(problems=[f"not there: {cls.about.where()}"])
    found = Survey(place.home)
    differences: dict[str, list[str]] = {}
    for split in SPLITS:
        try:
            dataset = cls(folder / name, split, on_bad_image="skip")
        except (ValueError, OSError) as error:
            if str(error) not in found.problems:
                found.problems.append(str(error))
            continue
        found.splits[split] = dataset
        for difference in dataset.differences:
            differences.setdefault(difference, []).append(split)
    found.problems += [f"{' and '.join(splits)}: {text}" for text, splits in differences.items()]
    return found


def table(surveys: dict[str, Survey], folder: Path) -> Table:
    """One row a dataset; numbers against the published ones."""
    shown = Table(title=f"Datasets in {folder}", title_justify="left")
    for heading in ("dataset", "found in", "split"):
        shown.add_column(heading)
    for heading in ("classes", *SPLITS):
        shown.add_column(heading, justify="right")
    for name, found in surveys.items():
        about, home = DATASETS[name].about, found.home
        if home is not None and home.is_relative_to(folder):
            home = home.relative_to(folder)
        last = list(found.splits.values())[-1:]
        sizes = zip(SPLITS, about.sizes(last[0].split_source if last else "coop"), strict=True)
        # Classes that have images; where the splits differ, of each.
        classes = {s: f"{len(data.labels.unique()):,}" for s, data in found.splits.items()}
        if len(set(classes.values())) > 1:
            classes = {"": ", ".join(f"{count} {split}" for split, count in classes.items())}
        shown.add_row(
            name,
            "[red]not there[/]" if home is None else str(home),
            last[0].split_name if last else "",
            _against(next(iter(classes.values()), None), about.classes),
            *(
                _against(f"{len(found.splits[s]):,}" if s in found.splits else None, size)
                for s, size in sizes
            ),
        )
    shown.caption = "✓ as published    ≠ before the published number    - not there"
    shown.caption_justify = "left"
    return shown


def _against(found: str | None, published: int) -> str:
    if found is None:
        return f"[dim]- {published:,}[/]"
    if found == f"{published:,}":
        return f"[green]{found} ✓[/]"
    return f"[yellow]{found} ≠[/] {published:,}"

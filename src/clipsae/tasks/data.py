"""`task=data`: which of the eleven datasets are there, and whether their sizes are the published
ones."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from omegaconf import DictConfig
from rich.progress import track
from rich.table import Table

from clipsae.data.eleven import ELEVEN, PublishedDataset
from clipsae.errors import ConfigError
from clipsae.tasks.table import terminal

SPLITS = ("train", "test")


@dataclass
class Survey:
    """What was found of one dataset.

    Attributes:
        name: of `conf/dataset`.
        home: the folder it was found in, or None.
        split_source, split_name: the split taken, "" where none could be read.
        classes, sizes: of each split that could be read the number of classes that have images,
            and of images.
        problems: in a sentence each what could not be read, and what is not as published.
    """

    name: str
    home: Path | None = None
    split_source: str = ""
    split_name: str = ""
    classes: dict[str, int] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


def run(cfg: DictConfig) -> None:
    """Print the table, then what is wrong or missing in a sentence each.

    Raises:
        ConfigError: `task.datasets` names one that does not exist.
    """
    names = list(cfg.task.datasets or ELEVEN)
    unknown = [name for name in names if name not in ELEVEN]
    if unknown:
        raise ConfigError(
            f"task.datasets has {unknown[0]!r}: expected names among {', '.join(ELEVEN)}"
        )
    folder = Path(cfg.paths.data_dir).expanduser()
    console = terminal()
    surveys = []
    with quiet():
        for name in track(names, "reading the lists", console=console, transient=True):
            surveys.append(survey(name, folder))
    console.print(table(surveys, folder))
    for found in surveys:
        for problem in found.problems:
            console.print(f"{found.name}: {problem}", soft_wrap=True, markup=False, highlight=False)


def survey(name: str, folder: Path) -> Survey:
    """Read the lists of both splits of one dataset; no image is opened.

    Args:
        name: one of `ELEVEN`.
        folder: the folder of all datasets.
    """
    cls = ELEVEN[name]
    found = Survey(name)
    place = cls.find(folder / name)
    if place is None:
        found.problems.append(f"not there: {cls.about.where()}")
        return found
    found.home = place.home
    differences: dict[str, list[str]] = {}
    for split in SPLITS:
        try:
            dataset: PublishedDataset = cls(folder / name, split, on_bad_image="skip")
        except (ValueError, OSError) as error:
            if str(error) not in found.problems:
                found.problems.append(str(error))
            continue
        found.split_source, found.split_name = dataset.split_source, dataset.split_name
        found.classes[split] = len(dataset.labels.unique())
        found.sizes[split] = len(dataset)
        for difference in dataset.differences:
            differences.setdefault(difference, []).append(split)
    found.problems += [f"{' and '.join(splits)}: {said}" for said, splits in differences.items()]
    return found


def table(surveys: list[Survey], folder: Path) -> Table:
    """One row a dataset; numbers against the published ones."""
    shown = Table(title=f"Datasets in {folder}", title_justify="left")
    for heading in ("dataset", "found in", "split"):
        shown.add_column(heading)
    for heading in ("classes", *SPLITS):
        shown.add_column(heading, justify="right")
    for found in surveys:
        about = ELEVEN[found.name].about
        published = about.sizes(found.split_source or "coop")
        shown.add_row(
            found.name,
            "[red]not there[/]" if found.home is None else _inside(found.home, folder),
            found.split_name,
            _against_classes(found.classes, about.classes),
            *(
                _against(found.sizes.get(split), size)
                for split, size in zip(SPLITS, published, strict=True)
            ),
        )
    shown.caption = "✓ as published    ≠ before the published number    - not there"
    shown.caption_justify = "left"
    return shown


def _inside(home: Path, folder: Path) -> str:
    return str(home.relative_to(folder)) if home.is_relative_to(folder) else str(home)


def _against(found: int | None, published: int) -> str:
    if found is None:
        return f"[dim]- {published:,}[/]"
    if found == published:
        return f"[green]{found:,} ✓[/]"
    return f"[yellow]{found:,} ≠[/] {published:,}"


def _against_classes(found: dict[str, int], published: int) -> str:
    """The number of classes, or where the splits differ that of each."""
    if len(set(found.values())) < 2:
        return _against(next(iter(found.values()), None), published)
    each = ", ".join(f"{found[split]:,} {split}" for split in SPLITS)
    return f"[yellow]{each} ≠[/] {published:,}"


@contextmanager
def quiet() -> Iterator[None]:
    """Without the line that each dataset logs: the table says the same."""
    logger = logging.getLogger("clipsae.data.eleven")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)

"""`task=findings`: the page of findings, from the finished cells of a sweep.

python run.py sweeps=findings task=findings
"""

import logging
from collections.abc import Sequence

from hydra.plugins.launcher import Launcher
from omegaconf import DictConfig

from clipsae.errors import ConfigError
from clipsae.report.questions import Result, read, write_page
from clipsae.tasks.sweep import cells_of, configs_of

log = logging.getLogger(__name__)

_OWN = ("task", "together", "logger", "paths")  # groups of overrides that say nothing of the sweep


def run(cfg: DictConfig) -> None:
    """One run is no sweep.

    Raises:
        ConfigError: always.
    """
    raise ConfigError("task=findings is about a sweep: add sweeps=findings to the command")


def show_sweep(launcher: Launcher, job_overrides: Sequence[Sequence[str]]) -> None:
    """Write the page: in place of the sweep's jobs.

    Raises:
        ConfigError: no cell is finished, or the folder cannot be written to.
    """
    cells = cells_of(configs_of(launcher, job_overrides), job_overrides)
    results = [
        Result(overrides, *(stage.path for stage in cell.stages))
        for cell, overrides in zip(cells, job_overrides, strict=True)
        if cell.finished and len(cell.stages) == 2
    ]
    folder = launcher.config.task.folder
    try:
        page = write_page(read(results, len(cells)), folder, _words(launcher.config))
    except ValueError as error:
        raise ConfigError(str(error)) from error
    except OSError as error:
        raise ConfigError(
            f"task.folder={folder}: the page cannot be written there ({error.strerror}): name a "
            "folder that can be written to"
        ) from error
    if len(results) < len(cells):
        log.warning("%d of %d cells are not finished", len(cells) - len(results), len(cells))
    print(f"page     {page}")


def _words(config: DictConfig) -> list[str]:
    """What the command line says of the sweep."""
    given = config.hydra.overrides.task
    return [w for w in given if w.partition("=")[0].partition(".")[0] not in _OWN]

"""The tasks that `run.py task=...` runs: each a module with `run(cfg)`."""

import logging
import signal
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

from omegaconf import DictConfig

from clipsae.errors import ConfigError

log = logging.getLogger(__name__)

SIGTERM_STATUS = 128 + signal.SIGTERM
SIGINT_STATUS = 128 + signal.SIGINT
# These do without torch, or print nothing but their results.
LIGHT = ("clipsae.tasks.status.run", "clipsae.tasks.gc.run", "clipsae.tasks.check.run")


def run_task(cfg: DictConfig, task: Callable[[DictConfig], None] | None = None) -> None:
    """Run the task that the config names.

    A `ConfigError` is shown as one line, without a traceback.

    Args:
        task: run in its place.

    Raises:
        SystemExit: after a SIGTERM (status 143) or Ctrl-C (130); for a `ConfigError` of a single
            run. In a multirun the launcher tells what failed.
    """
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode
    from hydra.utils import get_method

    from clipsae.tasks import options, plugins

    single = HydraConfig.get().mode == RunMode.RUN
    warn_in_one_line()
    try:
        given = HydraConfig.get().overrides
        options.check(cfg, given.task, of_sweep=given.hydra if single else ())
        plugins.load(cfg)
        if "torch" not in sys.modules and cfg.task._target_ not in LIGHT:
            log.info("importing torch and Lightning")  # seconds, on a cold disk a minute
        task = task or get_method(cfg.task._target_)
        if "lightning" in sys.modules:
            quiet_lightning()
        task(cfg)
    except KeyboardInterrupt:
        _say_interrupted()
    except SystemExit as stop:
        if isinstance(stop.__context__, KeyboardInterrupt):  # Lightning's way out
            _say_interrupted()
        # After a SIGTERM it has no code: a cut run would count as done.
        sys.exit(stop.code or SIGTERM_STATUS)
    except ConfigError as error:
        log.error("%s", error)
        if single:
            sys.exit(1)
        raise
    except Exception:
        if not single:  # of a sweep's failures no other traceback is shown
            log.exception("the job failed")
        raise


def _say_interrupted() -> None:
    log.warning("interrupted: run the same command again to continue; finished work is kept")
    sys.exit(SIGINT_STATUS)


def warn_in_one_line() -> None:
    """Show Python's warnings as lines of the log, without the source that they come from."""

    def show(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        said = " ".join(str(message).split())
        log.warning("%s (%s, %s:%d)", said, category.__name__, Path(filename).name, lineno)

    warnings.showwarning = show


def quiet_lightning() -> None:
    """Leave out the lines and warnings that a user can do nothing about. Lightning sets the levels
    of its loggers when it is imported: this comes after."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in (
        ".*LeafSpec.*",
        ".*does not have many workers.*",  # rendering scenes needs none
        ".*`srun` command is available.*",  # one process needs none
        ".*exists and is not empty.*",  # a job's folder holds Hydra's files, too
    ):
        warnings.filterwarnings("ignore", message=message, module="lightning.*")
    # More workers than cores are meant for the cluster, and do no harm on a laptop.
    warnings.filterwarnings("ignore", message=".*worker processes in total.*", module="torch.*")

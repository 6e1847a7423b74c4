"""The tasks that `run.py task=...` runs: each a module with `run(cfg)`."""

import logging
import os
import signal
import sys
import warnings

from omegaconf import DictConfig

from clipsae.errors import ConfigError

log = logging.getLogger(__name__)

SIGTERM_STATUS = 128 + signal.SIGTERM


def run_task(cfg: DictConfig) -> None:
    """Run the task that the config names.

    A `ConfigError` is the user's to mend: it is shown as one line, without a traceback.

    Raises:
        SystemExit: after a SIGTERM (status 143); for a `ConfigError` of a single run; under
            SLURM, where Hydra would swallow an exception and the job would count as completed.
    """
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode
    from hydra.utils import get_method

    from clipsae.tasks import plugins

    quiet_lightning()
    try:
        plugins.load(cfg)
        get_method(cfg.task._target_)(cfg)
    except SystemExit as stop:
        # Lightning's way out after a SIGTERM has no code: a cut run would count as done.
        sys.exit(stop.code or SIGTERM_STATUS)
    except Exception as error:
        single = HydraConfig.get().mode == RunMode.RUN
        expected = isinstance(error, ConfigError)
        if expected:
            log.error("%s", error)
        if "SLURM_JOB_ID" in os.environ or (single and expected):
            if not expected:
                log.exception("the task failed")
            sys.exit(1)
        raise


def quiet_lightning() -> None:
    """Leave out the lines and warnings that a user can do nothing about."""
    import lightning.pytorch  # sets its logger's level when imported

    logging.getLogger(lightning.pytorch.__name__).setLevel(logging.WARNING)
    for message in (
        ".*LeafSpec.*",
        ".*does not have many workers.*",  # rendering scenes needs none
        ".*exists and is not empty.*",  # a job's folder holds Hydra's files, too
    ):
        warnings.filterwarnings("ignore", message=message, module="lightning.*")

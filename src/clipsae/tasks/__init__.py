"""The tasks that `run.py task=...` runs: each a module with `run(cfg)`."""

import logging
import os
import sys
import warnings

from omegaconf import DictConfig

from clipsae.errors import ConfigError

log = logging.getLogger(__name__)


def run_task(cfg: DictConfig) -> None:
    """Run the task that the config names.

    A `ConfigError` is the user's to mend: it is shown as one line, without a traceback.

    Raises:
        SystemExit: under SLURM, where Hydra would swallow the exception and the job would count
            as completed; and for a `ConfigError` of a single run.
    """
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode
    from hydra.utils import get_method

    quiet_lightning()
    try:
        get_method(cfg.task._target_)(cfg)
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
    warnings.filterwarnings("ignore", message=".*LeafSpec.*", module="lightning.*")

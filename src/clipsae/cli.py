"""The command `clipsae`, which in a checkout is also `run.py`: compose a config and run its task.

A wheel carries `conf/` and `sweeps/` inside the package; in a checkout they lie at its top. An
installed command keeps its work in `outputs/` of the current folder, and looks for data in `data/`
there; a checkout has both in itself.
"""

import hashlib
import os
import signal
import sys
from pathlib import Path

import hydra
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from clipsae.errors import ConfigError
from clipsae.overrides import explain

_PACKAGE = Path(__file__).resolve().parent
_INSTALLED = (_PACKAGE / "conf").is_dir()

# The configs name the folder with `conf/` and `sweeps/` by this variable; run.py has set it.
ROOT = Path(
    os.environ.setdefault("CLIPSAE_ROOT", str(_PACKAGE if _INSTALLED else _PACKAGE.parents[1]))
)
if ROOT == _PACKAGE:
    os.environ.setdefault("CLIPSAE_OUTPUT", str(Path.cwd() / "outputs"))
    os.environ.setdefault("CLIPSAE_DATA", str(Path.cwd() / "data"))

# A job's folder is named by what was overridden, so that a continued sweep finds it again.
OmegaConf.register_new_resolver(
    "short_hash", lambda text: hashlib.sha256(text.encode()).hexdigest()[:8], replace=True
)


# Hydra shows what cannot be composed by itself, in several lines; with this it raises.
_RAISES = "HYDRA_FULL_ERROR"


def main() -> None:
    """Compose a config and run its task; what cannot be composed is answered in one sentence.

    Raises:
        SystemExit: with the status of the job.
    """
    # A shell that starts a command in the background (`&`) has it ignore Ctrl-C: a run is to save
    # a checkpoint then.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if _RAISES in os.environ:
        _compose()
        return
    os.environ[_RAISES] = "1"
    try:
        _compose()
    except (HydraException, OmegaConfBaseException, ConfigError) as error:
        print(
            error if isinstance(error, ConfigError) else explain(error, ROOT / "conf"),
            file=sys.stderr,
        )
        sys.exit(1)
    finally:
        os.environ.pop(_RAISES, None)


@hydra.main(version_base="1.3", config_path=str(ROOT / "conf"), config_name="config")
def _compose(cfg: DictConfig) -> None:
    os.environ.pop(_RAISES, None)  # errors of the job itself Hydra shows well
    # torch and lightning take seconds to import: they wait until the config is known to compose.
    from clipsae.tasks import run_task

    run_task(cfg)

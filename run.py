"""The one entry point: compose a config and run its task.

python run.py                                      # the built-in world, minutes, offline
python run.py model=topk model.k=16 dataset=scenes_colour
python run.py -m model=topk,sparsemax dataset=scenes_shape,scenes_colour
python run.py --help                               # every group and its choices
"""

import hashlib
import os
from pathlib import Path

import hydra
from omegaconf import DictConfig, OmegaConf

ROOT = Path(__file__).resolve().parent
os.environ.setdefault("CLIPSAE_ROOT", str(ROOT))
# A job's folder is named by what was overridden, so that a continued sweep finds it again.
OmegaConf.register_new_resolver(
    "short_hash", lambda text: hashlib.sha256(text.encode()).hexdigest()[:8], replace=True
)


@hydra.main(version_base="1.3", config_path=str(ROOT / "conf"), config_name="config")
def main(cfg: DictConfig) -> None:
    # torch and lightning take seconds to import: they wait until the config is known to compose.
    from clipsae.tasks import run_task

    run_task(cfg)


if __name__ == "__main__":
    main()

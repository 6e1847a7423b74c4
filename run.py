"""The one entry point in a checkout: compose a config and run its task.

python run.py                                      # the built-in world, minutes, offline
python run.py model=topk model.k=16 dataset=scenes_colour
python run.py -m model=topk,sparsemax dataset=scenes_shape,scenes_colour
python run.py --help                               # every group and its choices
"""

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parent
os.environ["CLIPSAE_ROOT"] = str(ROOT)

from clipsae.cli import main  # noqa: E402 (it finds the configs by the variable)

if __name__ == "__main__":
    main()

"""Imported by the fork server of `tests/warm.py`: all that a run imports, and caches that a first
composed config fills (its grammar, mainly)."""

import atexit
import gc
import weakref
from importlib import import_module

from hydra import compose, initialize_config_dir

from run import ROOT

for name in (
    "lightning.pytorch",
    "matplotlib.pyplot",
    "open_clip",
    "torchmetrics",
    "wandb.sdk.launch.inputs.internal",  # a run asks for it as it begins
    "clipsae.tasks.experiment",
    "clipsae.tasks.explore",
    "clipsae.tasks.report",
    "clipsae.tasks.visualize",
):
    import_module(name)
with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
    compose("config", ["sweeps=demo", "model=topk", "evaluation.ns=[1,5]"])
# The end of one fork must not remove what the imports have made for the next ones.
atexit.unregister(import_module("wandb.sdk.data_types._private").MEDIA_TMP.cleanup)
for finalizer in list(weakref.finalize._registry):
    finalizer.atexit = False
gc.freeze()  # collections in the forks do not touch, and so do not copy, what is here

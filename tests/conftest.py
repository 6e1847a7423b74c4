"""Shared by all tests: the environment, and real photos."""

import os
import signal
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
os.environ["CLIPSAE_ROOT"] = str(ROOT)
# Set before torch is imported: some tests fork, OpenMP's threads do not survive a fork, and a child
# that uses several would wait for them forever.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("WANDB_MODE", "offline")
# A job that a shell runs in the background ignores Ctrl-C, and so would all that tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)
# The GPU's kernels run in Triton's interpreter, which must be chosen before Triton is imported.
# (Here no test asks torch for a GPU: that would start one in this process, before it forks.)
if not Path("/dev/nvidiactl").exists():
    os.environ["TRITON_INTERPRET"] = "1"
PHOTOS = ROOT.parent / "shared" / "photos" / "imagenet" / "val"


@pytest.fixture(scope="session")
def photos() -> Path:
    """A thousand real ImageNet photos in class folders; not part of the project."""
    if not PHOTOS.is_dir():
        pytest.skip("no photos")
    return PHOTOS

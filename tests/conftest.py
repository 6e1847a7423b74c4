"""Shared by all tests: where the project lies, and composing its configs."""

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
os.environ["CLIPSAE_ROOT"] = str(ROOT)
# Before torch is imported, and whatever is set outside: some tests fork, and OpenMP's threads do
# not survive a fork: a child that computes with several waits for them for ever.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("WANDB_MODE", "offline")
PHOTOS = ROOT.parent / "shared" / "photos" / "imagenet" / "val"


@pytest.fixture(scope="session")
def photos() -> Path:
    """A thousand real ImageNet photos in class folders; no part of the project."""
    if not PHOTOS.is_dir():
        pytest.skip("the photos are not there")
    return PHOTOS

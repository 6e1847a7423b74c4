"""Shared by all tests: where the project lies, and composing its configs."""

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
os.environ["CLIPSAE_ROOT"] = str(ROOT)
os.environ.setdefault("WANDB_MODE", "offline")
PHOTOS = ROOT.parent / "shared" / "photos" / "imagenet" / "val"


@pytest.fixture(scope="session")
def photos() -> Path:
    """A thousand real ImageNet photos in class folders; no part of the project."""
    if not PHOTOS.is_dir():
        pytest.skip("the photos are not there")
    return PHOTOS

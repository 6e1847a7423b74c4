"""The fingerprint of a list of files: what it sees, and what it does not mind."""

import os
import shutil
from pathlib import Path

import pytest

from clipsae.data import dataset
from clipsae.data.dataset import ImageList

NAMES = [f"{n}.bmp" for n in range(6)]


def fingerprint_of(root: Path) -> str:
    return ImageList(root, NAMES, [0, 0, 0, 1, 1, 1], ["red", "blue"]).fingerprint


@pytest.fixture
def images(tmp_path) -> Path:
    """Six files of one size, as bitmaps are."""
    folder = tmp_path / "images"
    folder.mkdir()
    for n, name in enumerate(NAMES):
        (folder / name).write_bytes(bytes([n]) * 1000)
        os.utime(folder / name, ns=(0, 10**9 * n))
    return folder


@pytest.fixture(params=["all files", "all bytes", "contents"])
def bound(request, monkeypatch) -> str:
    """What the fingerprint looks at: sizes and times for one of two reasons, or contents."""
    if request.param != "contents":
        monkeypatch.setattr(dataset, "CONTENT_FILES", 5 if request.param == "all files" else 6)
        monkeypatch.setattr(dataset, "CONTENT_BYTES", 5_999)
    return request.param


@pytest.mark.parametrize("which", NAMES)
def test_every_file_that_is_replaced_is_seen(images, bound, which):
    before = fingerprint_of(images)
    (images / which).write_bytes(b"x" * 1000)
    assert fingerprint_of(images) != before


def test_a_copy_with_its_times_is_the_same(images, bound, tmp_path):
    shutil.copytree(images, tmp_path / "copy", copy_function=shutil.copy2)
    assert fingerprint_of(tmp_path / "copy") == fingerprint_of(images)


def test_a_copy_without_its_times_is_the_same_where_contents_are_read(images, bound, tmp_path):
    shutil.copytree(images, tmp_path / "copy", copy_function=shutil.copyfile)
    assert (fingerprint_of(tmp_path / "copy") == fingerprint_of(images)) == (bound == "contents")


def test_contents_are_read_up_to_the_bound(images, monkeypatch):
    monkeypatch.setattr(dataset, "CONTENT_FILES", 6)
    monkeypatch.setattr(dataset, "CONTENT_BYTES", 6_000)
    before = fingerprint_of(images)
    for name in NAMES:
        os.utime(images / name)
    assert fingerprint_of(images) == before


def test_a_file_that_is_gone_or_cannot_be_read_is_another_set(images, bound):
    before = fingerprint_of(images)
    (images / NAMES[3]).unlink()
    gone = fingerprint_of(images)
    (images / NAMES[3]).mkdir()
    assert before not in (gone, fingerprint_of(images))


def test_swapped_files_are_seen(images, bound):
    before = fingerprint_of(images)
    (images / "0.bmp").rename(images / "x")
    (images / "5.bmp").rename(images / "0.bmp")
    (images / "x").rename(images / "5.bmp")
    assert fingerprint_of(images) != before


def test_the_fingerprint_is_the_same_as_ever(images):
    """Finished work is found by it."""
    assert fingerprint_of(images) == "a44fba3787f88ec8"

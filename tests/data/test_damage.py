"""Damaged images are found before a training, and decide what is made of a set only if there are
any."""

import pytest
from PIL import Image

from clipsae.data import ImageFolder, reader
from clipsae.data import dataset as images
from clipsae.data.images import BadImageError
from clipsae.data.reader import find_damage, leaves_out, refuse_damaged


@pytest.fixture(autouse=True)
def _forgotten(monkeypatch):
    monkeypatch.setattr(reader, "_found", {})


@pytest.fixture
def folder(tmp_path):
    for name in "ab":
        for i in range(40):
            path = tmp_path / name / f"{i}.png"
            path.parent.mkdir(exist_ok=True)
            Image.new("RGB", (9, 9), (i, 0, 0)).save(path)
    return tmp_path


def break_(folder, *files):
    for file in files:
        path = folder / file
        path.write_bytes(path.read_bytes()[:50])


def dataset(folder, **options):
    return ImageFolder(folder, image_size=8, **options)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_damaged_file_is_refused_by_name(folder, num_workers):
    refuse_damaged(dataset(folder), num_workers)
    break_(folder, "b/17.png")
    with pytest.raises(BadImageError, match=r"b/17\.png: .*: repair or remove it, or .*=skip$"):
        refuse_damaged(dataset(folder), num_workers)
    break_(folder, "a/3.png", "a/39.png")
    with pytest.raises(BadImageError, match=r"\.png: .* \(3 such files\): repair"):
        refuse_damaged(dataset(folder), num_workers)


def test_what_skips_is_not_refused(folder):
    break_(folder, "b/17.png")
    refuse_damaged(dataset(folder, on_bad_image="skip"))


def test_looking_ends_after_its_time_and_says_so(folder, caplog, monkeypatch):
    caplog.set_level("INFO", "clipsae.data.reader")
    monkeypatch.setattr(reader, "SECONDS", 0.0)
    refuse_damaged(dataset(folder))
    assert "none among 32 of 80; the others are read as they come" in caplog.text


def test_a_set_is_looked_at_once(folder, monkeypatch):
    refuse_damaged(dataset(folder))
    monkeypatch.setattr(reader, "read_batches", None)
    assert find_damage(dataset(folder)) == (80, [])


def test_images_are_left_out_where_some_are_skipped(folder):
    assert not leaves_out(dataset(folder))
    assert not leaves_out(dataset(folder, on_bad_image="skip"))
    break_(folder, "b/17.png")
    assert leaves_out(dataset(folder, on_bad_image="skip"))
    assert not leaves_out(dataset(folder))  # which stops instead


@pytest.mark.parametrize("bound", ["CONTENT_FILES", "CONTENT_BYTES"])
def test_a_large_set_that_skips_is_taken_to_lack_some(folder, monkeypatch, bound):
    monkeypatch.setattr(images, bound, 79)
    assert leaves_out(dataset(folder, on_bad_image="skip"))

"""Files of every kind are read as open_clip reads them; what is wrong is said in a sentence."""

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image

from clipsae.data import ImageFolder
from clipsae.data.image_folder import wnids
from clipsae.data.images import BadImageError, preprocessing, read_image


@pytest.fixture
def noise():
    return np.random.default_rng(0).integers(0, 256, (37, 53, 3), dtype=np.uint8)


def as_open_clip(path, size):
    """uint8 pixels by open_clip's own evaluation transform."""
    transform = open_clip.image_transform(size, is_train=False, mean=(0, 0, 0), std=(1, 1, 1))
    return (transform(Image.open(path)) * 255).round().to(torch.uint8)


@pytest.mark.parametrize(
    ("mode", "suffix"),
    [("RGB", "jpg"), ("L", "jpg"), ("CMYK", "jpg"), ("RGB", "png"), ("RGBA", "png"), ("P", "png")],
)
@pytest.mark.parametrize("size", [16, 64])
def test_pixels_are_open_clips(tmp_path, noise, mode, suffix, size):
    path = tmp_path / f"image.{suffix}"
    Image.fromarray(noise).convert(mode).save(path)
    found = read_image(path, preprocessing(size))
    assert found.shape == (3, size, size)
    assert found.dtype == torch.uint8
    assert torch.equal(found, as_open_clip(path, size))


def test_sixteen_bits_are_not_clipped(tmp_path):
    ramp = np.linspace(0, 65535, 64 * 64).reshape(64, 64).astype(np.uint16)
    Image.fromarray(ramp).save(tmp_path / "deep.png")
    found = read_image(tmp_path / "deep.png", preprocessing(64))
    assert torch.equal(found[0], torch.from_numpy((ramp >> 8).astype(np.uint8)))


def test_a_single_pixel_becomes_an_image(tmp_path):
    Image.new("RGB", (1, 1), (10, 20, 30)).save(tmp_path / "dot.png")
    found = read_image(tmp_path / "dot.png", preprocessing(8))
    assert torch.equal(found, torch.tensor([10, 20, 30], dtype=torch.uint8)[:, None, None].expand(3, 8, 8))


def test_what_is_no_image_is_named(tmp_path, noise):
    Image.fromarray(noise).save(tmp_path / "cut.jpg", quality=95)
    whole = (tmp_path / "cut.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "empty.jpg").write_bytes(b"")
    (tmp_path / "text.jpg").write_text("a cat")
    Image.new("RGB", (1, 3000)).save(tmp_path / "strip.png")
    for name, reason in {
        "cut.jpg": "truncated",
        "empty.jpg": "not an image",
        "text.jpg": "not an image",
        "strip.png": "too long",
        "none.jpg": "no such file",
    }.items():
        with pytest.raises(BadImageError, match=reason) as caught:
            read_image(tmp_path / name, preprocessing(8))
        assert name in str(caught.value)


def make(folder, *files):
    for file in files:
        path = folder / file
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4)).save(path)


def test_classes_are_the_sorted_folders(tmp_path):
    make(tmp_path, "red_fox/2.png", "red_fox/1.JPG", "cat/deep/er/0.png", "cat/a.png")
    (tmp_path / "cat" / "notes.txt").write_text("not an image")
    (tmp_path / ".hidden").mkdir()
    data = ImageFolder(tmp_path, image_size=4)
    assert data.classnames == ["cat", "red fox"]
    assert data.files == ["cat/a.png", "cat/deep/er/0.png", "red_fox/1.JPG", "red_fox/2.png"]
    assert data.labels.tolist() == [0, 0, 1, 1]
    assert data[3][1] == 1
    assert ImageFolder(tmp_path, classnames="raw").classnames == ["cat", "red_fox"]


def test_split_folders_are_found(tmp_path):
    make(tmp_path, "train/a/1.png", "train/b/1.png", "val/a/2.png", "val/b/2.png", "val/b/3.png")
    assert len(ImageFolder(tmp_path, "train")) == 2
    assert len(ImageFolder(tmp_path, "test")) == 3


def test_the_fingerprint_says_what_the_images_are_not_where(tmp_path):
    make(tmp_path / "one", "a/1.png", "b/1.png")
    make(tmp_path / "two", "a/1.png", "b/1.png")
    make(tmp_path / "three", "a/1.png", "b/2.png")
    one, two, three = (ImageFolder(tmp_path / n).fingerprint for n in ("one", "two", "three"))
    assert one == two != three


def test_wnids_are_imagenets_classes(tmp_path):
    make(tmp_path, f"{wnids()[207]}/1.png", f"{wnids()[3]}/1.png")
    data = ImageFolder(tmp_path)
    assert data.labels.tolist() == [3, 207]
    assert data.classnames[207] == "Golden Retriever"
    assert len(data.classnames) == 1000
    assert ImageFolder(tmp_path, classnames="raw").classnames[207] == "n02099601"
    make(tmp_path, "n99999999/1.png")
    with pytest.raises(ValueError, match="n99999999 is no wnid"):
        ImageFolder(tmp_path)


def test_what_is_wrong_with_a_folder_is_said(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no such folder"):
        ImageFolder(tmp_path / "nowhere")
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="not a file"):
        ImageFolder(tmp_path / "file")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no class folders"):
        ImageFolder(tmp_path / "empty")
    (tmp_path / "empty" / "cat").mkdir()
    with pytest.raises(ValueError, match="hold no images"):
        ImageFolder(tmp_path / "empty")
    with pytest.raises(ValueError, match="expected train or test"):
        ImageFolder(tmp_path, "validation")
    with pytest.raises(ValueError, match="expected clean or raw"):
        ImageFolder(tmp_path, classnames="nice")


def test_a_class_without_images_is_reported(tmp_path, caplog):
    make(tmp_path, "a/1.png", "c/1.png")
    (tmp_path / "b").mkdir()
    data = ImageFolder(tmp_path)
    assert data.classnames == ["a", "b", "c"]
    assert data.labels.tolist() == [0, 2]
    assert "1 classes without images, such as b" in caplog.text


def test_real_photos(photos):
    data = ImageFolder(photos, image_size=224)
    assert len(data) == 1000
    assert data.labels.tolist() == list(range(1000))
    for index in range(0, 1000, 125):
        assert torch.equal(data[index][0], as_open_clip(data.root / data.files[index], 224))

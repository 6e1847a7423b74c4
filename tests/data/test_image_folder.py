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
    colour = torch.tensor([10, 20, 30], dtype=torch.uint8)
    assert torch.equal(found, colour[:, None, None].expand(3, 8, 8))


def test_orientation_tags_are_left_alone_as_open_clip_does(tmp_path, noise):
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees
    Image.fromarray(noise).save(tmp_path / "turned.jpg", exif=exif)
    found = read_image(tmp_path / "turned.jpg", preprocessing(16))
    assert torch.equal(found, as_open_clip(tmp_path / "turned.jpg", 16))


@pytest.mark.parametrize("suffix", ["jpg", "png", "gif", "tiff", "webp", "bmp"])
def test_broken_files_are_read_or_refused_by_name(tmp_path, noise, suffix):
    path = tmp_path / f"broken.{suffix}"
    Image.fromarray(noise).save(path)
    whole, random = path.read_bytes(), np.random.default_rng(1)
    for _ in range(150):
        broken = bytearray(whole[: random.integers(len(whole) // 2, len(whole) + 1)])
        for _ in range(random.integers(0, 8)):
            broken[random.integers(len(broken))] = random.integers(256)
        path.write_bytes(broken)
        try:
            assert read_image(path, preprocessing(8)).shape == (3, 8, 8)
        except BadImageError as error:
            assert path.name in str(error)  # noqa: PT017


def test_a_decoder_that_raises_anything_is_a_bad_image(tmp_path, noise, monkeypatch):
    """A broken TIFF made Pillow raise a TypeError."""
    Image.fromarray(noise).save(tmp_path / "image.png")

    def stumble(*_):
        raise TypeError("'str' object cannot be interpreted as an integer")

    with pytest.raises(BadImageError, match=r"image\.png: cannot be decoded \('str' object"):
        read_image(tmp_path / "image.png", stumble)


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


@pytest.mark.parametrize("only", ["train", "val"])
def test_a_lone_split_folder_serves_as_both_with_a_warning(tmp_path, caplog, only):
    make(tmp_path, f"{only}/a/1.png", f"{only}/b/1.png")
    for split in ("train", "test"):
        data = ImageFolder(tmp_path, split)
        assert data.classnames == ["a", "b"]
        assert data.files == [f"{only}/a/1.png", f"{only}/b/1.png"]
    assert f"{only} serves as both" in caplog.text


def test_imagenets_own_layout_whose_test_images_have_no_labels(tmp_path):
    make(tmp_path, "train/a/1.png", "val/a/2.png", "test/3.png")
    assert ImageFolder(tmp_path, "test").files == ["val/a/2.png"]


def test_a_class_may_be_called_train(tmp_path):
    make(tmp_path, "bus/1.png", "train/1.png")
    for split in ("train", "test"):
        assert ImageFolder(tmp_path, split).classnames == ["bus", "train"]


def test_a_label_means_the_same_in_each_split(tmp_path):
    make(tmp_path, "train/a/1.png", "train/b/1.png", "test/b/1.png", "test/c/1.png")
    train, test = ImageFolder(tmp_path, "train"), ImageFolder(tmp_path, "test")
    assert train.classnames == test.classnames == ["a", "b", "c"]
    assert train.labels.tolist() == [0, 1]
    assert test.labels.tolist() == [1, 2]


def test_hidden_files_and_links_that_lead_up_are_left_out(tmp_path):
    make(tmp_path, "a/1.png", "elsewhere/2.png")
    (tmp_path / "a" / "._1.png").write_bytes(b"what a Mac leaves")
    (tmp_path / "a" / "again").symlink_to(tmp_path / "a")
    (tmp_path / "a" / "linked").symlink_to(tmp_path / "elsewhere")
    assert ImageFolder(tmp_path).files == ["a/1.png", "a/linked/2.png", "elsewhere/2.png"]


def test_the_fingerprint_says_what_the_images_are_not_where(tmp_path):
    make(tmp_path / "one", "a/1.png", "b/1.png")
    make(tmp_path / "two", "a/1.png", "b/1.png")
    make(tmp_path / "three", "a/1.png", "b/2.png")
    make(tmp_path / "four", "a/1.png")
    (tmp_path / "four" / "b").mkdir()
    Image.new("RGB", (40, 40), "red").save(tmp_path / "four" / "b" / "1.png")
    one, two, three, four = (
        ImageFolder(tmp_path / n).fingerprint for n in ("one", "two", "three", "four")
    )
    assert one == two
    assert len({one, three, four}) == 3  # the fourth has the names of the first


def test_splits_with_the_same_file_names_have_other_fingerprints(tmp_path):
    make(tmp_path, "train/a/1.png", "test/a/1.png")
    train, test = (ImageFolder(tmp_path, split).fingerprint for split in ("train", "test"))
    assert train != test


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
    plain = ImageFolder(tmp_path, classnames="raw")
    assert plain.classnames == sorted([wnids()[3], wnids()[207], "n99999999"])
    assert plain.labels.tolist() == [0, 1, 2]


def test_wnids_are_those_of_open_clips_names(photos):
    """Where the names leave no doubt; and all folders of the real thing are there, in order."""
    assert len(wnids()) == 1000
    assert list(wnids()) == sorted(path.name for path in photos.iterdir())
    known = {"n01440764": "tench", "n02123045": "tabby cat", "n03028079": "church"}
    data = ImageFolder(photos)
    for wnid, name in known.items():
        assert data.classnames[wnids().index(wnid)] == name


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

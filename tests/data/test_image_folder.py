"""What a folder of class folders is read as: splits, classes and their names, images."""

import logging

import pytest
import torch
from PIL import Image

from clipsae.data import ImageFolder
from clipsae.data.image_folder import wnids
from clipsae.data.images import read_image
from tests.data.test_images import as_open_clip


@pytest.fixture(autouse=True)
def _lines(caplog):
    caplog.set_level(logging.INFO, "clipsae")


def warnings_of(caplog):
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def make(folder, *files):
    """Images in a folder: "a/{1,2}.png" are two."""
    for file in files:
        before, brace, rest = file.partition("{")
        options, _, after = rest.partition("}")
        if brace:
            make(folder, *(f"{before}{option}{after}" for option in options.split(",")))
        else:
            path = folder / file
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (4, 4)).save(path)


# --- splits and classes ---


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


@pytest.mark.parametrize(
    ("train", "test"),
    [
        *(("train", "test"), ("train", "val"), ("Training", "Testing"), ("Train", "TEST")),
        *(("trainval", "test"), ("train_val", "validation"), ("train", "dev"), ("train", "eval")),
        *(("training_set", "test_set"), ("01-train", "02-test"), ("TrainImages", "TestImages")),
        *(("images-train", "images-valid"), ("seg_train", "seg_test")),
        *(("birds_train", "birds_test"), ("train2017", "val2017")),
        # Folders that wrap others.
        ("birds/birds/birds/train", "birds/birds/birds/val"),
        ("archive/train/train", "archive/test/test"),
        ("archive/training_set/training_set", "archive/test_set/test_set"),
        ("intel/seg_train/seg_train", "intel/seg_test/seg_test"),
        ("up/img/Training", "up/img/Testing"),
        ("mixed/data/train/train", "mixed/data/test"),
    ],
)
def test_split_folders_are_found(tmp_path, caplog, train, test):
    make(tmp_path, f"{train}/{{a,b}}/1.png", f"{test}/a/2.png", f"{test}/b/{{2,3}}.png")
    make(tmp_path, f"{train.partition('/')[0]}/__MACOSX/birds/._1.png")
    (tmp_path / "README.txt").write_text("where it comes from")
    assert ImageFolder(tmp_path, "train").files == [f"{train}/a/1.png", f"{train}/b/1.png"]
    data = ImageFolder(tmp_path, "test")
    assert data.files == [f"{test}/a/2.png", f"{test}/b/2.png", f"{test}/b/3.png"]
    assert data.classnames == ["a", "b"]
    assert not data.one_split
    assert warnings_of(caplog) == []


@pytest.mark.parametrize(
    ("files", "classes"),
    [
        (["test tube/{a,b}/1.png", "train ride/{a,b}/1.png"], ["test tube", "train ride"]),
        (["crash test/{a,b}/1.png", "freight train/{a,b}/1.png"], ["crash test", "freight train"]),
        (["bus/1.png", "train/1.png"], ["bus", "train"]),
        (["one/birds/birds/{a,b}/1.png"], ["a", "b"]),
        # For those who have no classes.
        *(([f"photos/{inside}{{1,2}}.png"], ["photos"]) for inside in ("", "2020/", "deep/er/")),
    ],
)
def test_folders_without_splits(tmp_path, caplog, files, classes):
    make(tmp_path, *files)
    train, test = (ImageFolder(tmp_path, split) for split in ("train", "test"))
    assert train.classnames == test.classnames == classes
    assert train.files == test.files
    assert test.one_split
    assert f"both splits are the same {len(test)} images" in caplog.text


def test_of_several_splits_one_is_taken_and_the_others_are_named(tmp_path, caplog):
    make(tmp_path, *(f"{s}/{{a,b}}/{s}.png" for s in ("train", "trainval", "val", "test", "extra")))
    assert ImageFolder(tmp_path, "train").files == ["train/a/train.png", "train/b/train.png"]
    assert ImageFolder(tmp_path, "test").files == ["test/a/test.png", "test/b/test.png"]
    assert "no part of it: extra/, trainval/, val/" in caplog.text


@pytest.mark.parametrize("only", ["train", "val", "Training"])
def test_a_lone_split_folder_serves_as_both_with_a_warning(tmp_path, caplog, only):
    make(tmp_path, f"{only}/{{a,b}}/1.png")
    for split in ("train", "test"):
        data = ImageFolder(tmp_path, split)
        assert data.classnames == ["a", "b"]
        assert data.files == [f"{only}/a/1.png", f"{only}/b/1.png"]
        assert data.one_split
    assert f"both splits are the same 2 images of {only}/" in caplog.text


@pytest.mark.parametrize(
    "flat", ["test/3.png", "test/test/3.png", "test1/test1/3.png", "test/images/3.png"]
)
def test_test_images_without_labels_are_no_split(tmp_path, flat):
    make(tmp_path, "train/{a,b}/1.png", "val/a/2.png", flat)
    assert ImageFolder(tmp_path, "test").files == ["val/a/2.png"]
    assert ImageFolder(tmp_path, "train").classnames == ["a", "b"]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["train/{a,b}/1.png", "birds/1.png"], "birds/ beside it: use dataset.root=ROOT/train"),
        (["{train,val}/1.png"], "ROOT/train/<class>/<image>.jpg; images without"),
        (["images/{train,val}/1.png"], "images/train/<class>/<image>.jpg; images without"),
        (["{cropped,full}/{train,test}/a/1.png"], "such as dataset.root=ROOT/cropped"),
        (
            ["train/{Black,red}/0.png", "test/{black,red}/0.png"],
            "spelled Black in the training split and black in the",
        ),
        (["1.png"], "holds images and no class folders: .*dataset.root=PARENT"),
        ([], "holds no class folders"),
        (["cat/.hidden.png"], "no images in its 1 folders"),
    ],
)
def test_folders_that_are_refused(tmp_path, files, message):
    make(tmp_path, *files)
    message = message.replace("ROOT", str(tmp_path)).replace("PARENT", str(tmp_path.parent))
    with pytest.raises(ValueError, match=message):
        ImageFolder(tmp_path)


def test_paths_and_options_that_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no such folder"):
        ImageFolder(tmp_path / "nowhere")
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="not a file"):
        ImageFolder(tmp_path / "file")
    with pytest.raises(ValueError, match="expected train or test"):
        ImageFolder(tmp_path, "validation")
    with pytest.raises(ValueError, match="expected clean or raw"):
        ImageFolder(tmp_path, classnames="nice")


@pytest.mark.parametrize(
    ("files", "classes", "doubt"),
    [
        (["{A,B}/{red,blue}/1.png"], ["A", "B"], "A, B, which hold folders such as A/blue and"),
        (
            ["{red,blue}/{train,test}/1.png"],
            ["blue", "red"],
            "holds the folders test, train, whose images are taken together: splits are expected "
            "above the classes, ROOT/train/blue",
        ),
        (
            ["{train,test}/warm/{red,pink}/0.png", "{train,test}/cold/{blue,white}/0.png"],
            ["cold", "warm"],
            "such as cold/blue and cold/white: if those are the classes",
        ),
        (["all/0.png", "all/{red,blue}/1.png"], ["all"], "all/blue and all/red: if those are the"),
    ],
)
def test_classes_that_are_doubted(tmp_path, caplog, files, classes, doubt):
    make(tmp_path, *files)
    assert ImageFolder(tmp_path).classnames == classes
    assert doubt.replace("ROOT", str(tmp_path)) in warnings_of(caplog)[0]


def test_a_label_means_the_same_in_each_split(tmp_path, caplog):
    make(tmp_path, "train/{a,b}/1.png", "test/{b,c}/1.png")
    train, test = ImageFolder(tmp_path, "train"), ImageFolder(tmp_path, "test")
    assert train.classnames == test.classnames == ["a", "b", "c"]
    assert train.labels.tolist() == [0, 1]
    assert test.labels.tolist() == [1, 2]
    assert warnings_of(caplog) == [
        f"{tmp_path}: 1 of the 2 classes of the test split have no images in the training split, "
        "such as c"
    ]
    assert f"train split: 2 images of 2 of 3 classes (such as 'a') in {tmp_path}/train" in (
        caplog.text
    )


def test_a_class_has_an_image_in_some_split(tmp_path, caplog):
    """A folder without any is not one that CLIP could choose."""
    make(tmp_path, "train/{a,b}/1.png", "test/b/1.png", "test/lost+found/1.png")
    make(tmp_path, "test/__MACOSX/a/._1.png", "test/@eaDir/1.png/thumb.png")
    make(tmp_path, "train/a/@eaDir/1.png/SYNOPHOTO_THUMB_M.jpg", "train/a/.ipynb_checkpoints/1.png")
    for name in ("test/empty", "test/a", "train/$RECYCLE.BIN", "test/.ipynb_checkpoints"):
        (tmp_path / name).mkdir()
    train, test = ImageFolder(tmp_path, "train"), ImageFolder(tmp_path, "test")
    assert train.classnames == test.classnames == ["a", "b"]
    assert train.files == ["train/a/1.png", "train/b/1.png"]
    assert test.files == ["test/b/1.png"]
    assert (
        "no part of it: test/@eaDir/, test/__MACOSX/, test/empty/, test/lost+found/" in caplog.text
    )


# --- files ---


def test_images_are_told_by_content_where_the_ending_says_nothing(tmp_path, caplog):
    make(tmp_path, "a/{0.png,1.jfif,2.jpe,3.avif,4.jp2,5.PNG,6.TIF}")
    whole = (tmp_path / "a/0.png").read_bytes()
    for name in ("7", "8.heic", "photo.1", "9.jpg_large"):  # a PNG each, by content
        (tmp_path / "a" / name).write_bytes(whole)
    left = {
        "apple.heic": b"\0\0\0\x20ftypheic",
        "banana.heic": b"\0\0\0\x20ftypheic",
        "notes.txt": whole,
        "0.png~": whole,
        "0.png.bak": whole,
        ".hidden.png": whole,
        "Makefile": b"all:",
    }
    for name, content in left.items():
        (tmp_path / "a" / name).write_bytes(content)
    data = ImageFolder(tmp_path)
    taken = "0.png 1.jfif 2.jpe 3.avif 4.jp2 5.PNG 6.TIF 7 8.heic 9.jpg_large photo.1"
    assert [file[2:] for file in data.files] == taken.split()
    for part in (
        "test split: 11 images of 1 class (such as 'a')",
        "left out 7 files: 2 .heic that Pillow cannot read (such as a/",
        "1 .txt (such as a/notes.txt)",
        "1 hidden (such as a/.hidden.png)",
        "1 without an ending, no images (such as a/Makefile)",
    ):
        assert part in caplog.text
    for image, _ in data:
        assert image.shape == (3, 224, 224)


def test_images_beside_the_class_folders_are_left_out(tmp_path, caplog):
    make(tmp_path, "{a,b}/1.png", "logo.png")
    assert ImageFolder(tmp_path).files == ["a/1.png", "b/1.png"]
    assert "left out 1 file: 1 beside the class folders (such as logo.png)" in caplog.text


def test_endings_are_listed_without_opening_files(tmp_path, monkeypatch):
    make(tmp_path, "a/1.png", "a/2.jpg", "b/3.JPEG")
    (tmp_path / "a" / "labels.txt").write_text("a")

    def opened(*_, **__):
        raise AssertionError("a file was opened")

    monkeypatch.setattr(Image, "open", opened)
    assert len(ImageFolder(tmp_path)) == 3


def test_hidden_files_and_links_that_lead_up_are_left_out(tmp_path):
    make(tmp_path, "a/1.png", "elsewhere/2.png")
    (tmp_path / "a" / "._1.png").write_bytes(b"what a Mac leaves")
    (tmp_path / "a" / "again").symlink_to(tmp_path / "a")
    (tmp_path / "a" / "linked").symlink_to(tmp_path / "elsewhere")
    assert ImageFolder(tmp_path).files == ["a/1.png", "a/linked/2.png", "elsewhere/2.png"]


def test_photos_are_read_as_a_viewer_shows_them(tmp_path):
    make(tmp_path, "{a,b}/1.png")
    exif = Image.Exif()
    exif[0x0112] = 3
    top = Image.new("RGB", (8, 8))
    top.paste((255, 255, 255), (0, 0, 8, 4))
    top.save(tmp_path / "a" / "1.png", exif=exif)
    Image.new("RGBA", (8, 8), (0, 0, 0, 0)).save(tmp_path / "b" / "1.png")
    data = ImageFolder(tmp_path, image_size=8)
    assert (data[0][0][:, :4] == 0).all()
    assert (data[0][0][:, 4:] == 255).all()
    assert (data[1][0] == 255).all()


def test_the_fingerprint_is_of_the_images_and_not_of_their_place(tmp_path):
    make(tmp_path, "{one,two,four}/{a,b}/1.png", "three/{a/1,b/2}.png")
    Image.new("RGB", (40, 40), "red").save(tmp_path / "four" / "b" / "1.png")
    make(tmp_path, "five/{train,test}/a/1.png")
    one, two, three, four = (
        ImageFolder(tmp_path / n).fingerprint for n in ("one", "two", "three", "four")
    )
    train, test = (ImageFolder(tmp_path / "five", s).fingerprint for s in ("train", "test"))
    assert one == two
    assert len({one, three, four, train, test}) == 5  # the fourth has the names of the first


# --- names ---

NAMES = {
    "BlackTern": "Black Tern",
    "black_Tern": "black Tern",
    "black tern": "black tern",
    "redCircle": "red Circle",
    "RedCircle2": "Red Circle 2",
    "Boeing737Max": "Boeing 737 Max",
    "HTMLPage": "HTML Page",
    "USAFlag": "USA Flag",
    "TShirt": "T Shirt",
    "PlanB": "Plan B",
    "ÉcoleNormale": "École Normale",
    "РусскоеСлово": "Русское Слово",
    "iPhoneCase": "iPhone Case",
    **{name: name for name in ("iPhone", "McLaren", "USA", "DVDs", "MP4-12C", "4Runner", "An-12")},
    **{name: name for name in ("mp3", "日本", "BMW ActiveHybrid 5")},
}


def test_underscores_and_camel_case_are_taken_apart(tmp_path):
    make(tmp_path, *(f"{name}/1.png" for name in NAMES))
    data = ImageFolder(tmp_path)
    assert dict(zip(sorted(NAMES), data.classnames, strict=True)) == NAMES
    assert ImageFolder(tmp_path, classnames="raw").classnames == sorted(NAMES)


def test_names_that_become_the_same(tmp_path, caplog):
    make(tmp_path, "{RedFox,Red_Fox,cat}/1.png")
    assert ImageFolder(tmp_path).classnames == ["Red Fox", "Red Fox", "cat"]
    assert "1 class names belong to several folders, such as 'red fox'" in caplog.text


def test_wnids_are_imagenets_classes(tmp_path, caplog):
    make(tmp_path, f"{wnids()[207]}/1.png", f"{wnids()[3]}/1.png")
    data = ImageFolder(tmp_path)
    assert data.labels.tolist() == [3, 207]
    assert data.classnames[207] == "Golden Retriever"
    assert len(data.classnames) == 1000
    assert ImageFolder(tmp_path, classnames="raw").classnames[207] == "n02099601"
    present = ImageFolder(tmp_path, classes="present")
    assert present.labels.tolist() == [0, 1]
    assert present.classnames == ["tiger shark", "Golden Retriever"]
    assert "2 images of 2 of 1,000 classes (such as 'tiger shark')" in caplog.text
    make(tmp_path, "n99999999/1.png")
    with pytest.raises(ValueError, match="n99999999 is not a wnid"):
        ImageFolder(tmp_path)
    plain = ImageFolder(tmp_path, classnames="raw")
    assert plain.classnames == sorted([wnids()[3], wnids()[207], "n99999999"])
    assert plain.labels.tolist() == [0, 1, 2]


def test_real_photos(photos):
    """Of all wnids; names where they leave no doubt."""
    assert list(wnids()) == sorted(path.name for path in photos.iterdir())
    data = ImageFolder(photos, image_size=224)
    assert data.labels.tolist() == list(range(1000))
    known = {"n01440764": "tench", "n02123045": "tabby cat", "n03028079": "church"}
    for wnid, name in known.items():
        assert data.classnames[wnids().index(wnid)] == name
    for index in range(0, 1000, 125):
        image = read_image(data.root / data.files[index], 224, as_seen=False)
        assert torch.equal(image, as_open_clip(data.root / data.files[index], 224))

"""What is not there or broken is named in one sentence."""

import json
import shutil
from pathlib import Path

import pytest
import torchvision.datasets

from clipsae.data.eleven import ELEVEN
from tests.data.eleven.toys import BUILDERS, LAYOUTS

OTHERS = [name for name in BUILDERS if not name.startswith("imagenet")]


@pytest.fixture
def build(tmp_path):
    """A dataset of one's own, to be broken."""
    return lambda name, layout: BUILDERS[name](tmp_path, layout)


@pytest.mark.parametrize("name", BUILDERS)
def test_a_dataset_that_is_not_there(tmp_path, name):
    about = ELEVEN[name].about
    with pytest.raises(FileNotFoundError) as caught:
        ELEVEN[name](tmp_path / name)
    said = str(caught.value)
    for part in (str(tmp_path / name), about.title, about.layout, about.source, about.licence):
        assert part in said
    assert "\n" not in said
    (tmp_path / name).mkdir()  # an empty folder is no dataset
    with pytest.raises(FileNotFoundError, match="CLIPSAE_DATA"):
        ELEVEN[name](tmp_path / name)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", OTHERS)
def test_an_image_that_is_not_there(build, caplog, name, layout):
    built = build(name, layout)
    if not built.files["test"]:
        pytest.skip("images are listed as they are")
    data = ELEVEN[name](built.root)
    gone = data.root / built.files["test"][1]
    gone.unlink()
    with pytest.raises(FileNotFoundError, match="names 1 images that are not there") as caught:
        ELEVEN[name](built.root)
    assert str(gone) in str(caught.value)
    left = ELEVEN[name](built.root, on_bad_image="skip")
    assert left.files == data.files[:1] + data.files[2:]
    assert left.labels.tolist() == data.labels[:1].tolist() + data.labels[2:].tolist()
    assert "names 1 images that are not there" in caplog.text


ANNOTATIONS = [
    ("dtd", "official", "labels/test1.txt"),
    ("fgvc_aircraft", "official", "variants.txt"),
    ("fgvc_aircraft", "coop", "images_variant_test.txt"),
    ("food101", "official", "meta/test.json"),
    ("oxford_pets", "official", "annotations/test.txt"),
    ("stanford_cars", "official", "devkit/cars_meta.mat"),
    ("stanford_cars", "official", "cars_test_annos_withlabels.mat"),
    ("sun397", "official", "SUN397/ClassName.txt"),
    ("sun397", "official", "Partitions/Testing_01.txt"),
    ("ucf101", "official", "ucfTrainTestlist/classInd.txt"),
    ("ucf101", "official", "ucfTrainTestlist/testlist01.txt"),
]


@pytest.mark.parametrize(("name", "layout", "file"), ANNOTATIONS)
@pytest.mark.parametrize("content", [b"", b"\xff\xfe\x00broken", b"a broken\nfile", None])
def test_an_annotation_that_is_broken_or_missing(build, name, layout, file, content):
    built = build(name, layout)
    path = ELEVEN[name](built.root).place.home / file
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        ELEVEN[name](built.root)
    assert Path(file).name in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"\xff\xfe\x00broken", b"a broken\nfile"])
def test_a_coop_file_that_is_broken(build, content):
    built = build("caltech101", "coop")
    path = ELEVEN["caltech101"](built.root).place.home / "split_zhou_Caltech101.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"split_zhou_Caltech101.json is not .* get it anew"):
        ELEVEN["caltech101"](built.root)


def test_files_that_are_missing_altogether(build):
    built = build("sun397", "official")
    shutil.rmtree(built.root.parent / "Partitions")
    with pytest.raises(FileNotFoundError, match=r"Testing_01.txt is missing.*Partitions.zip"):
        ELEVEN["sun397"](built.root)
    built = build("ucf101", "official")
    shutil.rmtree(built.root / "ucfTrainTestlist")
    with pytest.raises(
        FileNotFoundError, match=r"ucfTrainTestlist is missing.*split_zhou_UCF101.json"
    ):
        ELEVEN["ucf101"](built.root)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ([], "has no list 'train'"),
        ({"train": [], "val": []}, "has no list 'test'"),
        ({"train": [], "val": [], "test": []}, "nothing in 'test'"),
        ({"train": [["a/1.jpg", 0]], "val": [], "test": []}, "is not \\[image path"),
        ({"train": ["a"], "val": [], "test": []}, "is not \\[image path"),
        ({"train": [], "val": [], "test": [["a/1.jpg", 1, "a"]]}, "no image has label 0"),
        ({"train": [], "val": [], "test": [["a/1.jpg", -1, "a"]]}, "expected labels 0, 1"),
        (
            {"train": [["a/1.jpg", 0, "a"]], "val": [], "test": [["b/1.jpg", 0, "b"]]},
            "label 0 is both 'a' and 'b'",
        ),
    ],
)
def test_a_coop_file_that_is_none(build, content, said):
    built = build("eurosat", "coop")
    (built.root / "split_zhou_EuroSAT.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=said) as caught:
        ELEVEN["eurosat"](built.root)
    assert "split_zhou_EuroSAT.json" in str(caught.value)


@pytest.mark.parametrize(
    "option", [{"split": "val"}, {"split_source": "mine"}, {"classnames": "x"}, {"templates": "x"}]
)
def test_an_unknown_option_is_refused(build, option):
    with pytest.raises(ValueError, match=f"{next(iter(option))}='.*': expected"):
        ELEVEN["dtd"](build("dtd", "coop").root, **option)


def test_download_is_torchvisions(tmp_path, monkeypatch):
    calls = []

    def fetch(root, download):
        calls.append((root, download))
        BUILDERS["dtd"](root, "official")  # as torchvision.datasets.DTD(root) lays it out

    monkeypatch.setattr(torchvision.datasets, "DTD", fetch)
    root = tmp_path / "dtd"
    data = ELEVEN["dtd"](root, download=True)
    assert calls == [(root, True)]
    assert len(data) == 9
    ELEVEN["dtd"](root, download=True)
    assert len(calls) == 1


def test_download_that_fails(tmp_path, monkeypatch):
    def fetch(root, download):
        raise OSError("no route to host")

    monkeypatch.setattr(torchvision.datasets, "Food101", fetch)
    with pytest.raises(FileNotFoundError, match=r"could not be downloaded \(no route to host\)"):
        ELEVEN["food101"](tmp_path / "food101", download=True)
    with pytest.raises(ValueError, match="nobody serves Stanford Cars for a program"):
        ELEVEN["stanford_cars"](tmp_path / "stanford_cars", download=True)

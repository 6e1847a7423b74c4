"""Each dataset is read as it lies on disk, in both layouts, and as torchvision reads it."""

import shutil
from pathlib import Path

import pytest
import torch
import torchvision.datasets
from open_clip import IMAGENET_CLASSNAMES

from clipsae.data.eleven import ELEVEN
from clipsae.data.image_folder import wnids
from tests.data.eleven.toys import BUILDERS, LAYOUTS, WNIDS

OTHERS = [name for name in BUILDERS if not name.startswith("imagenet")]


@pytest.fixture(scope="module")
def toys(tmp_path_factory):
    """(name, layout) -> what was built; read only."""
    made = {}
    for layout in LAYOUTS:
        folder = tmp_path_factory.mktemp(layout)
        for name, builder in BUILDERS.items():
            made[name, layout] = builder(folder, layout)
    return made


@pytest.fixture
def build(tmp_path):
    """A dataset of one's own, to be changed."""
    return lambda name, layout: BUILDERS[name](tmp_path, layout)


def test_the_table_is_complete():
    assert list(ELEVEN) == sorted(BUILDERS)
    tests = {name: cls.about.sizes("coop")[1] for name, cls in ELEVEN.items()}
    assert tests == {
        "caltech101": 2_465,
        "dtd": 1_692,
        "eurosat": 8_100,
        "fgvc_aircraft": 3_333,
        "food101": 30_300,
        "imagenet": 50_000,
        "imagenet_sketch": 50_889,
        "oxford_pets": 3_669,
        "stanford_cars": 8_041,
        "sun397": 19_850,
        "ucf101": 3_783,
    }


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", BUILDERS)
def test_files_labels_and_names_are_the_datasets(toys, name, layout, split):
    built = toys[name, layout]
    data = ELEVEN[name](built.root, split=split, image_size=32)
    assert data.split_source == built.split_source
    assert data.labels.tolist() == built.labels[split]
    if built.files[split]:
        assert data.files == built.files[split]
    if built.clean:
        assert data.classnames == built.clean
        assert ELEVEN[name](built.root, split, classnames="raw").classnames == built.raw
    assert data.templates is None
    image, label = data[0]
    assert image.shape == (3, 32, 32)
    assert image.dtype == torch.uint8
    assert label == built.labels[split][0]
    for index in range(len(data)):
        assert (data.root / data.files[index]).is_file()


@pytest.mark.parametrize("name", BUILDERS)
def test_the_datasets_own_prompt_is_an_option(toys, name):
    (prompt,) = ELEVEN[name](toys[name, "coop"].root, templates="dataset").templates
    assert prompt.count("{}") == 1
    assert prompt.format("x") != "x"


@pytest.mark.parametrize("name", [name for name in OTHERS if ELEVEN[name].about.split_file])
def test_names_by_rule_are_coops_names(toys, name):
    cls, root = ELEVEN[name], toys[name, "coop"].root
    coop = cls(root, split_source="coop")
    raw = cls(root, split_source="coop", classnames="raw")
    assert [coop.clean(name) for name in raw.classnames] == coop.classnames


def test_names_that_are_hard():
    clean = {name: cls.clean for name, cls in ELEVEN.items()}

    def rule(name, raw):
        return clean[name](ELEVEN[name].__new__(ELEVEN[name]), raw)

    assert rule("caltech101", "gerenuk") == "gerenuk"
    assert rule("caltech101", "wild_cat") == "wild cat"
    assert rule("caltech101", "Motorbikes") == "motorbike"
    assert rule("eurosat", "HerbaceousVegetation") == "Herbaceous Vegetation Land"
    assert rule("ucf101", "TaiChi") == "Tai Chi"
    assert rule("ucf101", "BasketballDunk") == "Basketball Dunk"
    assert rule("sun397", "theater/indoor_procenium") == "indoor procenium theater"
    assert rule("sun397", "basement") == "basement"
    assert rule("stanford_cars", "smart fortwo Convertible 2012") == "2012 smart fortwo Convertible"
    assert rule("fgvc_aircraft", "Falcon_2000") == "Falcon_2000"
    assert rule("oxford_pets", "Egyptian_Mau") == "egyptian mau"
    assert rule("dtd", "polka-dotted") == "polka-dotted"


TORCHVISION = {
    "dtd": lambda data, split: torchvision.datasets.DTD(data, split),
    "fgvc_aircraft": lambda data, split: torchvision.datasets.FGVCAircraft(data, split),
    "food101": lambda data, split: torchvision.datasets.Food101(data, split),
    "oxford_pets": lambda data, split: torchvision.datasets.OxfordIIITPet(
        data, {"train": "trainval"}.get(split, split)
    ),
    "stanford_cars": lambda data, split: torchvision.datasets.StanfordCars(data, split),
}


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("name", TORCHVISION)
def test_official_splits_are_torchvisions(toys, name, split):
    root = toys[name, "official"].root
    theirs = TORCHVISION[name](root.parent, split)
    ours = ELEVEN[name](root, split, classnames="raw")
    if name == "stanford_cars":
        files, labels = zip(*theirs._samples, strict=True)
    else:
        files = theirs._images if name == "oxford_pets" else theirs._image_files
        labels = theirs._labels
    found = zip((str(ours.root / file) for file in ours.files), ours.labels.tolist(), strict=True)
    assert set(found) == set(zip(map(str, files), labels, strict=True))
    if name == "oxford_pets":  # torchvision writes the words with capitals
        assert [c.replace("_", " ").title() for c in ours.classnames] == theirs.classes
    else:
        assert ours.classnames == theirs.classes


@pytest.mark.parametrize("name", ["caltech101", "eurosat", "sun397"])
def test_labels_of_all_images_are_torchvisions(toys, name):
    root = toys[name, "official"].root
    ours = ELEVEN[name](root, classnames="raw")
    if name == "sun397":
        theirs = torchvision.datasets.SUN397(root.parent)
        pairs = zip(theirs._image_files, theirs._labels, strict=True)
        labels = {str(f): theirs.classes[y] for f, y in pairs}
    elif name == "eurosat":
        theirs = torchvision.datasets.EuroSAT(root)
        labels = {file: theirs.classes[label] for file, label in theirs.samples}
    else:
        (root / "Annotations").mkdir(exist_ok=True)
        theirs = torchvision.datasets.Caltech101(root.parent)
        labels = {
            str(ours.root / c / f"image_{n:04d}.jpg"): c
            for c, n in zip([theirs.categories[y] for y in theirs.y], theirs.index, strict=True)
        }
    for file, label in zip(ours.files, ours.labels.tolist(), strict=True):
        assert labels[str(ours.root / file)] == ours.classnames[label]


def test_the_rule_splits_in_coops_proportions(tmp_path):
    for count, name in ((37, "River"), (120, "Forest")):
        for n in range(count):
            (tmp_path / "2750" / name).mkdir(parents=True, exist_ok=True)
            (tmp_path / "2750" / name / f"{n}.jpg").touch()
    cls = ELEVEN["eurosat"]
    train, test = cls(tmp_path, "train"), cls(tmp_path, "test")
    assert torch.bincount(train.labels).tolist() == [60, 18]
    assert torch.bincount(test.labels).tolist() == [120 - 60 - 24, 37 - 18 - 7]
    assert not set(train.files) & set(test.files)
    assert test.files == cls(tmp_path, "test").files
    numbers = sorted(int(Path(file).stem) for file in test.files if file[0] == "F")
    assert numbers[0] < 20  # mixed, not the first or the last ones
    assert numbers[-1] > 100


def test_the_rule_takes_folders_without_images_for_no_classes(tmp_path):
    """What a Mac's archive, a file system and a half-deleted class leave beside the classes."""
    for name in ("cat", "dog", "__MACOSX", "@eaDir", "lost+found", "empty"):
        (tmp_path / "2750" / name).mkdir(parents=True)
        for number in range(10 * (name != "empty")):
            (tmp_path / "2750" / name / f"{number}.jpg").touch()
    data = ELEVEN["eurosat"](tmp_path)
    assert data.classnames == ["cat", "dog"]
    assert set(data.labels.tolist()) == {0, 1}


def test_which_split_is_taken(build, caplog):
    built = build("dtd", "coop")
    coop, official = (ELEVEN["dtd"](built.root, split_source=s) for s in ("coop", "official"))
    assert coop.files == built.files["test"] == ELEVEN["dtd"](built.root).files
    assert official.files == built.files["train"]  # the toy's splits are exchanged
    assert coop.fingerprint != official.fingerprint
    with caplog.at_level("INFO"):
        ELEVEN["dtd"](built.root)
    assert "dtd: 12 test images of 3 classes (CoOp's split) in" in caplog.text
    (built.root / "split_zhou_DescribableTextures.json").unlink()
    assert ELEVEN["dtd"](built.root).split_source == "official"
    with pytest.raises(FileNotFoundError, match=r"no split_zhou_DescribableTextures.json in .*dtd"):
        ELEVEN["dtd"](built.root, split_source="coop")


def test_coop_file_above_a_nested_home_is_found(build):
    built = build("dtd", "coop")
    (built.root / "dtd").mkdir()
    shutil.move(built.root / "images", built.root / "dtd" / "images")
    assert ELEVEN["dtd"](built.root).split_source == "coop"


@pytest.mark.parametrize("name", BUILDERS)
def test_a_fingerprint_is_the_same_wherever_the_data_lie(toys, build, name):
    assert (
        ELEVEN[name](build(name, "coop").root).fingerprint
        == ELEVEN[name](toys[name, "coop"].root).fingerprint
    )


def test_imagenet_has_a_thousand_classes_by_index(toys):
    data = ELEVEN["imagenet"](toys["imagenet", "official"].root)
    assert data.classnames == list(IMAGENET_CLASSNAMES)
    for label, name in WNIDS.values():
        assert data.classnames[label] == name
    raw = ELEVEN["imagenet"](toys["imagenet", "official"].root, classnames="raw")
    assert tuple(raw.classnames) == wnids()


def test_real_photos(photos):
    data = ELEVEN["imagenet"](photos.parent, "test")
    assert data.labels.tolist() == list(range(1000))
    assert data[207][0].shape == (3, 224, 224)
    with pytest.raises(FileNotFoundError, match="train is not there: ImageNet's train split"):
        ELEVEN["imagenet"](photos.parent, "train")


def test_imagenet_that_is_not_sorted_yet(tmp_path):
    (tmp_path / "val").mkdir()
    (tmp_path / "val" / "ILSVRC2012_val_00000001.JPEG").touch()
    with pytest.raises(ValueError, match="only images: sort them into one folder a class first"):
        ELEVEN["imagenet"](tmp_path)
    (tmp_path / "val" / "n00000001").mkdir()
    with pytest.raises(ValueError, match="n00000001 is no wnid of ImageNet-1k"):
        ELEVEN["imagenet"](tmp_path)


def test_sketch_says_that_its_splits_are_one(toys, caplog):
    built = toys["imagenet_sketch", "coop"]
    train = ELEVEN["imagenet_sketch"](built.root, "train")
    assert "one split" in caplog.text
    assert "995 of 1,000 classes without images: n01443537, n01484850" in caplog.text
    assert train.files == ELEVEN["imagenet_sketch"](built.root, "test").files

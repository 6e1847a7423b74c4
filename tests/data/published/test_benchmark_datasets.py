"""Each published dataset is read as it lies on disk, in both layouts, and as torchvision reads it;
what is missing or broken is named in a sentence."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torchvision.datasets
from open_clip import IMAGENET_CLASSNAMES

from clipsae.data import eleven
from clipsae.data.image_folder import wnids
from clipsae.data.published import DATASETS
from tests.data.published.toys import BUILDERS, LAYOUTS, WNIDS

OTHERS = [name for name in BUILDERS if not name.startswith("imagenet")]


@pytest.fixture(scope="module")
def toys(tmp_path_factory):
    """(name, layout) -> what was built, each in a data folder of its own; read only."""
    root = tmp_path_factory.mktemp("toys")
    return {(n, s): BUILDERS[n](root / s / n, s) for n in BUILDERS for s in LAYOUTS}


@pytest.fixture
def build(tmp_path, toys):
    """A copy to be changed."""

    def build(name, layout):
        built = toys[name, layout]
        shutil.copytree(built.root.parent, tmp_path, dirs_exist_ok=True)
        return replace(built, root=tmp_path / name)

    return build


def test_the_table_is_complete():
    assert list(DATASETS) == sorted(BUILDERS)
    sizes = "2465 1692 8100 3333 30300 50000 50889 3669 8041 19850 3783"
    assert [cls.about.sizes("coop")[1] for cls in DATASETS.values()] == [*map(int, sizes.split())]
    for name in ("caltech101", "eurosat"):
        assert len(DATASETS[name].about.class_folders) == DATASETS[name].about.classes
    assert eleven.ELEVEN is DATASETS  # older configs name it
    assert eleven.DTD is DATASETS["dtd"]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", BUILDERS)
def test_files_labels_and_names_are_the_datasets(toys, name, layout):
    built, cls = toys[name, layout], DATASETS[name]
    for split in ("train", "test"):
        data = cls(built.root, split=split, image_size=32)
        assert data.split_source == built.split_source
        assert data.labels.tolist() == built.labels[split]
        if built.files[split]:
            assert data.files == built.files[split]
        assert data.templates is None
        image, label = data[0]
        assert (image.shape, image.dtype, label) == ((3, 32, 32), torch.uint8, data.labels[0])
        assert all((data.root / file).is_file() for file in data.files)
    raw = cls(built.root, classnames="raw", templates="dataset")
    if built.clean:
        assert data.classnames == built.clean
        assert raw.classnames == built.raw
        if built.split_source == "coop":  # names by rule are CoOp's
            assert [raw.clean(name) for name in raw.classnames] == data.classnames
    (prompt,) = raw.templates
    assert prompt.count("{}") == 1
    assert prompt.format("x") != "x"


@pytest.mark.parametrize(
    ("name", "raw", "clean"),
    [
        ("caltech101", "gerenuk", "gerenuk"),
        ("caltech101", "wild_cat", "wild cat"),
        ("caltech101", "Motorbikes", "motorbike"),
        ("eurosat", "HerbaceousVegetation", "Herbaceous Vegetation Land"),
        ("ucf101", "TaiChi", "Tai Chi"),
        ("sun397", "theater/indoor_procenium", "indoor procenium theater"),
        ("sun397", "basement", "basement"),
        ("stanford_cars", "smart fortwo Convertible 2012", "2012 smart fortwo Convertible"),
        ("fgvc_aircraft", "Falcon_2000", "Falcon_2000"),
        ("oxford_pets", "Egyptian_Mau", "egyptian mau"),
        ("dtd", "polka-dotted", "polka-dotted"),
    ],
)
def test_names_that_are_hard(name, raw, clean):
    cls = DATASETS[name]
    assert cls.clean(cls.__new__(cls), raw) == clean


# --- against torchvision ---


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
    ours = DATASETS[name](root, split, classnames="raw")
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
    ours = DATASETS[name](root, classnames="raw")
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


# --- which split ---


def test_the_rule_splits_in_coops_proportions(tmp_path):
    for count, name in ((37, "River"), (120, "Forest")):
        (tmp_path / "2750" / name).mkdir(parents=True)
        for n in range(count):
            (tmp_path / "2750" / name / f"{n}.jpg").touch()
    cls = DATASETS["eurosat"]
    train, test = cls(tmp_path, "train"), cls(tmp_path, "test")
    assert torch.bincount(train.labels).tolist() == [60, 18]
    assert torch.bincount(test.labels).tolist() == [120 - 60 - 24, 37 - 18 - 7]
    assert not set(train.files) & set(test.files)
    # The same on every machine: by a hash, neither the first nor the last ones.
    rivers = [int(Path(file).stem) for file in test.files if file.startswith("River")]
    assert sorted(rivers) == [0, 3, 4, 9, 12, 13, 18, 20, 21, 25, 30, 32]


def test_the_rule_ignores_folders_without_images(tmp_path):
    """What a Mac's archive, a file system and a half-deleted class leave beside the classes."""
    for name in ("cat", "dog", "__MACOSX", "@eaDir", "lost+found", "empty"):
        (tmp_path / "2750" / name).mkdir(parents=True)
        for number in range(10 * (name != "empty")):
            (tmp_path / "2750" / name / f"{number}.jpg").touch()
    assert DATASETS["eurosat"](tmp_path).classnames == ["cat", "dog"]


def test_which_split_is_read(build, caplog):
    built, cls = build("dtd", "coop"), DATASETS["dtd"]
    caplog.set_level("INFO")
    coop, official = (cls(built.root, split_source=s) for s in ("coop", "official"))
    assert coop.files == built.files["test"] == cls(built.root).files
    assert official.files == built.files["train"]  # the toy's splits are exchanged
    assert coop.fingerprint != official.fingerprint
    assert "dtd: 12 test images of 3 classes (CoOp's split) in" in caplog.text
    (built.root / "dtd").mkdir()
    shutil.move(built.root / "images", built.root / "dtd" / "images")
    assert cls(built.root).split_source == "coop"  # also above a nested home
    (built.root / "split_zhou_DescribableTextures.json").unlink()
    assert cls(built.root).split_source == "official"
    with pytest.raises(FileNotFoundError, match=r"no split_zhou_DescribableTextures.json in .*dtd"):
        cls(built.root, split_source="coop")


@pytest.mark.parametrize("name", BUILDERS)
def test_a_fingerprint_does_not_depend_on_the_place(toys, build, name):
    fingerprint = DATASETS[name](build(name, "coop").root).fingerprint
    assert fingerprint == DATASETS[name](toys[name, "coop"].root).fingerprint


# --- ImageNet ---


def test_imagenet_has_a_thousand_classes_by_index(toys):
    data = DATASETS["imagenet"](toys["imagenet", "official"].root)
    assert data.classnames == list(IMAGENET_CLASSNAMES)
    for label, name in WNIDS.values():
        assert data.classnames[label] == name
    raw = DATASETS["imagenet"](toys["imagenet", "official"].root, classnames="raw")
    assert tuple(raw.classnames) == wnids()


def test_real_photos(photos):
    data = DATASETS["imagenet"](photos.parent, "test")
    assert data.labels.tolist() == list(range(1000))
    assert data[207][0].shape == (3, 224, 224)
    with pytest.raises(FileNotFoundError, match="train is missing: ImageNet's train split"):
        DATASETS["imagenet"](photos.parent, "train")


def test_imagenet_that_is_not_sorted_yet(tmp_path):
    (tmp_path / "val").mkdir()
    (tmp_path / "val" / "ILSVRC2012_val_00000001.JPEG").touch()
    with pytest.raises(ValueError, match="only images: sort them into one folder a class first"):
        DATASETS["imagenet"](tmp_path)
    (tmp_path / "val" / "n00000001").mkdir()
    with pytest.raises(ValueError, match="n00000001 is not a wnid of ImageNet-1k"):
        DATASETS["imagenet"](tmp_path)


def test_sketch_warns_that_it_has_one_split(toys, caplog):
    built = toys["imagenet_sketch", "coop"]
    train = DATASETS["imagenet_sketch"](built.root, "train")
    assert "one split" in caplog.text
    assert "995 of 1,000 classes without images: n01443537, n01484850" in caplog.text
    assert train.files == DATASETS["imagenet_sketch"](built.root, "test").files


# --- other layouts: Kaggle, mmpretrain, archives unpacked in their own ways ---

# What is moved where, below the data folder: "a > b, c > d".
MOVED = [
    ("caltech101", "coop", "caltech-101 > Caltech101"),
    ("caltech101", "coop", "caltech-101 > caltech101/caltech-101"),
    (
        *("caltech101", "official"),
        "caltech101/101_ObjectCategories > caltech101/101_ObjectCategories/101_ObjectCategories",
    ),
    ("caltech101", "official", "caltech101/101_ObjectCategories > caltech-101"),
    ("caltech101", "official", "caltech101/101_ObjectCategories > caltech101/archive/caltech-101"),
    ("dtd", "official", "dtd/dtd > DTD-r1.0.1/dtd"),
    ("dtd", "official", "dtd/dtd > dtd/dtd/dtd/dtd"),
    ("dtd", "coop", "dtd/images > dtd/images/images, dtd/labels > dtd/labels/labels"),
    ("eurosat", "official", "eurosat/eurosat/2750 > EuroSAT/2750"),
    ("eurosat", "official", "eurosat/eurosat/2750 > eurosat/EuroSAT_RGB"),
    ("eurosat", "official", "eurosat/eurosat/2750 > eurosat/EuroSAT"),
    ("eurosat", "official", "eurosat/eurosat/2750 > eurosat/EuroSAT/2750"),
    ("eurosat", "official", "eurosat/eurosat/2750 > EuroSAT_RGB"),
    ("eurosat", "coop", "eurosat/2750 > eurosat/2750/2750"),
    ("fgvc_aircraft", "official", "fgvc-aircraft-2013b > fgvc-aircraft-2013b/fgvc-aircraft-2013b"),
    ("fgvc_aircraft", "official", "fgvc-aircraft-2013b > FGVC-Aircraft/fgvc-aircraft-2013b"),
    ("food101", "official", "food-101 > food101/archive/food-101/food-101"),
    (
        *("food101", "official"),
        "food-101/meta > food101/meta/meta, food-101/images > food101/images",
    ),
    ("imagenet", "official", "imagenet > ImageNet/ILSVRC/Data/CLS-LOC"),
    ("imagenet", "official", "imagenet > imagenet-1k/ILSVRC2012"),
    ("imagenet", "official", "imagenet/val > imagenet/val/val"),
    ("imagenet_sketch", "official", "imagenet_sketch/sketch > ImageNet-Sketch/sketch/sketch"),
    ("oxford_pets", "official", "oxford-iiit-pet > Oxford-IIIT-Pet"),
    (
        *("oxford_pets", "official"),
        "oxford-iiit-pet/images > oxford_pets/images/images, "
        "oxford-iiit-pet/annotations > oxford_pets/annotations/annotations",
    ),
    (
        *("stanford_cars", "official"),
        "stanford_cars/cars_train > stanford_cars/cars_train/cars_train, "
        "stanford_cars/cars_test > stanford_cars/cars_test/cars_test, "
        "stanford_cars/cars_test_annos_withlabels.mat > "
        "stanford_cars/devkit/cars_test_annos_withlabels.mat, "
        "stanford_cars/devkit > stanford_cars/car_devkit/devkit",
    ),
    (
        *("stanford_cars", "coop"),
        "stanford_cars/cars_train > stanford_cars/cars_train/cars_train, "
        "stanford_cars > Stanford-Cars",
    ),
    ("sun397", "official", "SUN397 > SUN397/SUN397, Partitions > SUN397/Partitions"),
    (
        *("sun397", "official"),
        "SUN397 > sun397/SUN397/SUN397, "
        "Partitions/Training_01.txt > sun397/SUN397/Training_01.txt, "
        "Partitions/Testing_01.txt > sun397/SUN397/Testing_01.txt, "
        "sun397/SUN397/SUN397/ClassName.txt > sun397/SUN397/ClassName.txt",
    ),
    ("ucf101", "coop", "ucf101/UCF-101-midframes > ucf101/UCF-101-midframes/UCF-101-midframes"),
    (
        *("ucf101", "official"),
        "ucf101/ucfTrainTestlist > ucf101/UCF101TrainTestSplits/ucfTrainTestlist, ucf101 > UCF-101",
    ),
]


def move(data: Path, moves: str) -> None:
    for source, target in (one.split(" > ") for one in moves.split(", ")):
        aside = data / "aside"
        shutil.move(data / source, aside)
        (data / target).parent.mkdir(parents=True, exist_ok=True)
        aside.rename(data / target)


@pytest.mark.parametrize(("name", "layout", "moves"), MOVED)
def test_it_is_found_and_read(tmp_path, build, name, layout, moves):
    built = build(name, layout)
    before = DATASETS[name](built.root)
    move(tmp_path, moves)
    for split in ("train", "test"):
        data = DATASETS[name](built.root, split)
        assert data.labels.tolist() == built.labels[split]
        assert data.split_source == built.split_source
        assert all((data.root / file).is_file() for file in data.files)
    assert [Path(file).name for file in data.files] == [Path(file).name for file in before.files]
    assert data.classnames == before.classnames


def test_kaggles_validation_images_of_imagenet_are_sorted_by_its_list(tmp_path, build):
    built = build("imagenet", "official")
    expected = [(Path(f).name, Path(f).parts[1]) for f in built.files["test"]]
    home = tmp_path / "imagenet" / "ILSVRC" / "Data" / "CLS-LOC"
    (home / "val").mkdir(parents=True)
    move(tmp_path, "imagenet/train > imagenet/ILSVRC/Data/CLS-LOC/train")
    for file, _ in expected:
        (tmp_path / "imagenet" / "val").rglob(file).__next__().rename(home / "val" / file)
    # The challenge's boxes lie in folders of the same names.
    (home.parents[1] / "Annotations" / "CLS-LOC" / "train" / "n01440764").mkdir(parents=True)
    (home.parents[1] / "Annotations" / "CLS-LOC" / "train" / "n01440764" / "x.xml").touch()
    with pytest.raises(ValueError, match=r"only images: sort .*, or put Kaggle's LOC_val_solution"):
        DATASETS["imagenet"](built.root)
    lines = [f"{Path(file).stem},{wnid} 1 2 3 4 {wnid} 5 6 7 8 " for file, wnid in expected]
    path = tmp_path / "imagenet" / "LOC_val_solution.csv"
    path.write_text("\n".join(["ImageId,PredictionString", *lines]) + "\n")
    data = DATASETS["imagenet"](built.root)
    labels = dict(zip((name for name, _ in expected), built.labels["test"], strict=True))
    found = zip((Path(file).name for file in data.files), data.labels.tolist(), strict=True)
    assert dict(found) == labels
    assert len(DATASETS["imagenet"](built.root, "train")) == len(built.files["train"])
    path.write_text("ImageId,PredictionString\nILSVRC2012_val_00000001,cat 1 2 3 4\n")
    with pytest.raises(ValueError, match=r"LOC_val_solution.csv: 'cat' is not one of the 1,000"):
        DATASETS["imagenet"](built.root)


def test_satellite_images_of_thirteen_bands_are_ignored(tmp_path, build):
    built = build("eurosat", "official")
    bands = tmp_path / "eurosat" / "EuroSAT_MS" / "River"
    bands.mkdir(parents=True)
    (bands / "River_1.tif").touch()
    move(tmp_path, "eurosat/eurosat/2750 > eurosat/EuroSAT_RGB")
    assert DATASETS["eurosat"](built.root).place.images == tmp_path / "eurosat" / "EuroSAT_RGB"
    shutil.rmtree(tmp_path / "eurosat" / "EuroSAT_RGB")
    with pytest.raises(FileNotFoundError, match="EuroSAT is not in"):
        DATASETS["eurosat"](built.root)


# --- what is missing or broken ---


@pytest.mark.parametrize("name", BUILDERS)
def test_a_dataset_that_is_missing(tmp_path, build, name):
    if name in ("oxford_pets", "food101", "sun397", "caltech101"):
        build("dtd", "coop")  # another dataset's folder is not read instead
    about = DATASETS[name].about
    with pytest.raises(FileNotFoundError, match="CLIPSAE_DATA") as caught:
        DATASETS[name](tmp_path / name)
    for part in (str(tmp_path / name), about.title, about.layout, about.source, about.licence):
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)
    (tmp_path / name).mkdir()  # an empty folder is no dataset
    with pytest.raises(FileNotFoundError, match="CLIPSAE_DATA"):
        DATASETS[name](tmp_path / name)


@pytest.mark.parametrize(
    ("name", "layout"),
    [(n, s) for n in OTHERS for s in LAYOUTS if s == "coop" or n not in ("caltech101", "eurosat")],
)
def test_an_image_that_is_missing(build, caplog, name, layout):
    built = build(name, layout)
    data = DATASETS[name](built.root)
    gone = data.root / built.files["test"][1]
    gone.unlink()
    with pytest.raises(FileNotFoundError, match="lists 1 images that do not exist") as caught:
        DATASETS[name](built.root)
    assert str(gone) in str(caught.value)
    left = DATASETS[name](built.root, on_bad_image="skip")
    assert left.files == data.files[:1] + data.files[2:]
    assert left.labels.tolist() == data.labels[:1].tolist() + data.labels[2:].tolist()
    assert "lists 1 images that do not exist" in caplog.text


def test_a_copy_without_any_of_its_images(build):
    built = build("stanford_cars", "official")
    shutil.rmtree(built.root / "cars_test")
    for option in ("error", "skip"):
        with pytest.raises(FileNotFoundError) as caught:
            DATASETS["stanford_cars"](built.root, on_bad_image=option)
        message = str(caught.value)
        assert message.startswith(f"none of the 9 images listed in {built.root}/cars_test_annos")
        assert "expected cars_train/, cars_test/" in message
        assert "skip" not in message
    assert len(DATASETS["stanford_cars"](built.root, "train")) == 18


def test_classes_that_differ_are_named(build, caplog):
    built = build("caltech101", "official")
    images = built.root / "101_ObjectCategories"
    (images / "anchor").mkdir()
    (images / "unicorn").mkdir()
    (images / "unicorn" / "1.jpg").write_bytes((images / "Faces" / "image_0001.jpg").read_bytes())
    data = DATASETS["caltech101"](built.root)
    assert data.differences == [
        "96 of 100 classes without images: Motorbikes, accordion, anchor, ant, barrel and 91 more",
        "classes that were not published: unicorn",
    ]
    for difference in data.differences:
        assert f"caltech101, test: {difference}" in caplog.text


BROKEN = (b"", b"\xff\xfe\x00broken", b"a broken\nfile", None)


@pytest.mark.parametrize(
    ("name", "layout", "file", "contents"),
    [
        ("caltech101", "coop", "split_zhou_Caltech101.json", BROKEN[:3]),
        ("dtd", "official", "labels/test1.txt", BROKEN),
        ("fgvc_aircraft", "official", "variants.txt", BROKEN),
        ("fgvc_aircraft", "coop", "images_variant_test.txt", BROKEN),
        ("food101", "official", "meta/test.json", BROKEN),
        ("oxford_pets", "official", "annotations/test.txt", (*BROKEN, b"a_1 2 1 1", b"a_1 x 1 1")),
        ("stanford_cars", "official", "devkit/cars_meta.mat", BROKEN),
        ("stanford_cars", "official", "cars_test_annos_withlabels.mat", BROKEN),
        ("sun397", "official", "SUN397/ClassName.txt", BROKEN),
        ("sun397", "official", "Partitions/Testing_01.txt", BROKEN),
        ("ucf101", "official", "ucfTrainTestlist/classInd.txt", BROKEN),
        ("ucf101", "official", "ucfTrainTestlist/testlist01.txt", BROKEN),
    ],
)
def test_an_annotation_that_is_broken_or_missing(build, name, layout, file, contents):
    built = build(name, layout)
    path = DATASETS[name](built.root).place.home / file
    for content in contents:
        path.unlink(missing_ok=True)
        if content is not None:
            path.write_bytes(content)
        with pytest.raises((ValueError, FileNotFoundError)) as caught:
            DATASETS[name](built.root)
        assert path.name in str(caught.value)
        assert "\n" not in str(caught.value)
        if content is None and DATASETS[name].about.split_file:
            assert f"{DATASETS[name].about.split_file} (see DATASETS.md" in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], "has no list 'train'"),
        ({"train": [], "val": []}, "has no list 'test'"),
        ({"train": [], "val": [], "test": []}, "images in 'test'"),
        ({"train": [["a/1.jpg", 0]], "val": [], "test": []}, "is not \\[image path"),
        ({"train": ["a"], "val": [], "test": []}, "is not \\[image path"),
        ({"train": [], "val": [], "test": [["a/1.jpg", 1, "a"]]}, "expected labels 0, 1"),
        ({"train": [], "val": [], "test": [["a/1.jpg", -1, "a"]]}, "expected labels 0, 1"),
        (
            {"train": [["a/1.jpg", 0, "a"]], "val": [], "test": [["b/1.jpg", 0, "b"]]},
            "label 0 is both 'a' and 'b'",
        ),
    ],
)
def test_a_coop_file_that_is_none(tmp_path, content, message):
    (tmp_path / "2750").mkdir()
    (tmp_path / "split_zhou_EuroSAT.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=f"split_zhou_EuroSAT.json.*{message}"):
        DATASETS["eurosat"](tmp_path)


@pytest.mark.parametrize("option", ["split", "split_source", "classnames", "templates"])
def test_an_unknown_option_is_refused(toys, option):
    with pytest.raises(ValueError, match=f"{option}='x': expected"):
        DATASETS["dtd"](toys["dtd", "coop"].root, **{option: "x"})


def test_download_is_torchvisions(tmp_path, monkeypatch):
    calls = []

    def fetch(root, download):
        calls.append((root, download))
        BUILDERS["dtd"](root, "official")  # as torchvision.datasets.DTD(root) lays it out

    monkeypatch.setattr(torchvision.datasets, "DTD", fetch)
    root = tmp_path / "dtd"
    assert len(DATASETS["dtd"](root, download=True)) == 9
    DATASETS["dtd"](root, download=True)
    assert calls == [(root, True)]


def test_download_that_fails(tmp_path, monkeypatch):
    def fetch(root, download):
        raise OSError("no route to host")

    monkeypatch.setattr(torchvision.datasets, "Food101", fetch)
    with pytest.raises(FileNotFoundError, match=r"could not be downloaded \(no route to host\)"):
        DATASETS["food101"](tmp_path / "food101", download=True)
    with pytest.raises(ValueError, match="Stanford Cars has no direct download"):
        DATASETS["stanford_cars"](tmp_path / "stanford_cars", download=True)

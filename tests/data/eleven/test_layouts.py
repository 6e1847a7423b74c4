"""The eleven datasets as others lay them out: Kaggle, mmpretrain, archives unpacked in their own
ways. Each is a toy in a known layout, moved."""

import shutil
from pathlib import Path

import pytest

from clipsae.data.eleven import ELEVEN
from tests.data.eleven.toys import BUILDERS

# What is moved where, below the data folder.
LAYOUTS = [
    ("caltech101", "coop", {"caltech-101": "Caltech101"}),
    ("caltech101", "coop", {"caltech-101": "caltech101/caltech-101"}),
    (
        "caltech101",
        "official",
        {
            "caltech101/101_ObjectCategories": "caltech101/x",
            "caltech101/x": "caltech101/101_ObjectCategories/101_ObjectCategories",
        },
    ),
    ("caltech101", "official", {"caltech101/101_ObjectCategories": "caltech-101"}),
    (
        "caltech101",
        "official",
        {"caltech101/101_ObjectCategories": "caltech101/archive/caltech-101"},
    ),
    ("dtd", "official", {"dtd/dtd": "DTD-r1.0.1/dtd"}),
    ("dtd", "official", {"dtd/dtd": "dtd/dtd/dtd/dtd"}),
    (
        "dtd",
        "coop",
        {"dtd/images": "dtd/x", "dtd/x": "dtd/images/images", "dtd/labels": "dtd/labels/labels"},
    ),
    ("eurosat", "official", {"eurosat/eurosat/2750": "EuroSAT/2750"}),
    ("eurosat", "official", {"eurosat/eurosat/2750": "eurosat/EuroSAT_RGB"}),
    ("eurosat", "official", {"eurosat/eurosat/2750": "eurosat/EuroSAT"}),
    ("eurosat", "official", {"eurosat/eurosat/2750": "eurosat/EuroSAT/2750"}),
    ("eurosat", "official", {"eurosat/eurosat/2750": "EuroSAT_RGB"}),
    ("eurosat", "coop", {"eurosat/2750": "eurosat/2750/2750"}),
    (
        "fgvc_aircraft",
        "official",
        {"fgvc-aircraft-2013b": "fgvc-aircraft-2013b/fgvc-aircraft-2013b"},
    ),
    ("fgvc_aircraft", "official", {"fgvc-aircraft-2013b": "FGVC-Aircraft/fgvc-aircraft-2013b"}),
    (
        "food101",
        "official",
        {"food-101": "food101/archive/food-101/food-101"},
    ),
    (
        "food101",
        "official",
        {"food-101/meta": "food101/meta/meta", "food-101/images": "food101/images"},
    ),
    ("imagenet", "official", {"imagenet": "ImageNet/ILSVRC/Data/CLS-LOC"}),
    ("imagenet", "official", {"imagenet": "imagenet-1k/ILSVRC2012"}),
    ("imagenet", "official", {"imagenet/val": "imagenet/x", "imagenet/x": "imagenet/val/val"}),
    (
        "imagenet_sketch",
        "official",
        {"imagenet_sketch/sketch": "ImageNet-Sketch/sketch/sketch"},
    ),
    ("oxford_pets", "official", {"oxford-iiit-pet": "Oxford-IIIT-Pet"}),
    (
        "oxford_pets",
        "official",
        {
            "oxford-iiit-pet/images": "oxford_pets/images/images",
            "oxford-iiit-pet/annotations": "oxford_pets/annotations/annotations",
        },
    ),
    (
        "stanford_cars",
        "official",
        {
            "stanford_cars/cars_train": "stanford_cars/x",
            "stanford_cars/x": "stanford_cars/cars_train/cars_train",
            "stanford_cars/cars_test": "stanford_cars/y",
            "stanford_cars/y": "stanford_cars/cars_test/cars_test",
            "stanford_cars/cars_test_annos_withlabels.mat": (
                "stanford_cars/devkit/cars_test_annos_withlabels.mat"
            ),
            "stanford_cars/devkit": "stanford_cars/car_devkit/devkit",
        },
    ),
    (
        "stanford_cars",
        "coop",
        {
            "stanford_cars/cars_train": "stanford_cars/x",
            "stanford_cars/x": "stanford_cars/cars_train/cars_train",
            "stanford_cars": "Stanford-Cars",
        },
    ),
    (
        "sun397",
        "official",
        {"SUN397": "x", "x": "SUN397/SUN397", "Partitions": "SUN397/Partitions"},
    ),
    (
        "sun397",
        "official",
        {
            "SUN397": "sun397/SUN397/SUN397",
            "Partitions/Training_01.txt": "sun397/SUN397/Training_01.txt",
            "Partitions/Testing_01.txt": "sun397/SUN397/Testing_01.txt",
            "sun397/SUN397/SUN397/ClassName.txt": "sun397/SUN397/ClassName.txt",
        },
    ),
    (
        "ucf101",
        "coop",
        {
            "ucf101/UCF-101-midframes": "ucf101/x",
            "ucf101/x": "ucf101/UCF-101-midframes/UCF-101-midframes",
        },
    ),
    (
        "ucf101",
        "official",
        {
            "ucf101/ucfTrainTestlist": "ucf101/UCF101TrainTestSplits/ucfTrainTestlist",
            "ucf101": "UCF-101",
        },
    ),
]


def move(data: Path, source: str, target: str) -> None:
    aside = data / "aside"
    shutil.move(data / source, aside)
    (data / target).parent.mkdir(parents=True, exist_ok=True)
    aside.rename(data / target)


@pytest.mark.parametrize(
    ("name", "layout", "moved"),
    LAYOUTS,
    ids=[f"{name}-{layout}-{'+'.join(moved.values())}" for name, layout, moved in LAYOUTS],
)
def test_it_is_found_and_read(tmp_path, name, layout, moved):
    built = BUILDERS[name](tmp_path, layout)
    before = ELEVEN[name](built.root)
    for source, target in moved.items():
        move(tmp_path, source, target)
    for split in ("train", "test"):
        data = ELEVEN[name](built.root, split)
        assert data.labels.tolist() == built.labels[split]
        assert data.split_source == built.split_source
        assert all((data.root / file).is_file() for file in data.files)
    assert [Path(file).name for file in data.files] == [Path(file).name for file in before.files]
    assert data.classnames == before.classnames
    assert len(data[0][0]) == 3


def test_kaggles_validation_images_of_imagenet_are_sorted_by_its_list(tmp_path):
    built = BUILDERS["imagenet"](tmp_path, "official")
    expected = [(Path(f).name, Path(f).parts[1]) for f in built.files["test"]]
    home = tmp_path / "imagenet" / "ILSVRC" / "Data" / "CLS-LOC"
    (home / "val").mkdir(parents=True)
    move(tmp_path, "imagenet/train", "imagenet/ILSVRC/Data/CLS-LOC/train")
    for file, _ in expected:
        (tmp_path / "imagenet" / "val").rglob(file).__next__().rename(home / "val" / file)
    # The challenge's boxes lie in folders of the same names.
    (home.parents[1] / "Annotations" / "CLS-LOC" / "train" / "n01440764").mkdir(parents=True)
    (home.parents[1] / "Annotations" / "CLS-LOC" / "train" / "n01440764" / "x.xml").touch()
    with pytest.raises(ValueError, match=r"only images: sort .*, or put Kaggle's LOC_val_solution"):
        ELEVEN["imagenet"](built.root)
    lines = [f"{Path(file).stem},{wnid} 1 2 3 4 {wnid} 5 6 7 8 " for file, wnid in expected]
    path = tmp_path / "imagenet" / "LOC_val_solution.csv"
    path.write_text("\n".join(["ImageId,PredictionString", *lines]) + "\n")
    data = ELEVEN["imagenet"](built.root)
    labels = dict(zip((name for name, _ in expected), built.labels["test"], strict=True))
    found = zip((Path(file).name for file in data.files), data.labels.tolist(), strict=True)
    assert dict(found) == labels
    assert len(ELEVEN["imagenet"](built.root, "train")) == len(built.files["train"])
    path.write_text("ImageId,PredictionString\nILSVRC2012_val_00000001,cat 1 2 3 4\n")
    with pytest.raises(ValueError, match=r"LOC_val_solution.csv: the line .* is not"):
        ELEVEN["imagenet"](built.root)


def test_satellite_images_of_thirteen_bands_are_not_taken(tmp_path):
    built = BUILDERS["eurosat"](tmp_path, "official")
    bands = tmp_path / "eurosat" / "EuroSAT_MS" / "River"
    bands.mkdir(parents=True)
    (bands / "River_1.tif").touch()
    move(tmp_path, "eurosat/eurosat/2750", "eurosat/EuroSAT_RGB")
    assert ELEVEN["eurosat"](built.root).place.images == tmp_path / "eurosat" / "EuroSAT_RGB"
    shutil.rmtree(tmp_path / "eurosat" / "EuroSAT_RGB")
    with pytest.raises(FileNotFoundError, match="EuroSAT is not in"):
        ELEVEN["eurosat"](built.root)


def test_another_datasets_folder_is_not_taken(tmp_path):
    BUILDERS["dtd"](tmp_path, "coop")
    for name in ("oxford_pets", "food101", "sun397", "caltech101"):
        with pytest.raises(FileNotFoundError, match="is not in"):
            ELEVEN[name](tmp_path / name)


def test_classes_that_differ_are_named(tmp_path, caplog):
    built = BUILDERS["caltech101"](tmp_path, "official")
    images = built.root / "101_ObjectCategories"
    (images / "anchor").mkdir()
    (images / "unicorn").mkdir()
    (images / "unicorn" / "1.jpg").write_bytes((images / "Faces" / "image_0001.jpg").read_bytes())
    data = ELEVEN["caltech101"](built.root)
    assert data.differences == [
        "96 of 100 classes without images: Motorbikes, accordion, anchor, ant, barrel and 91 more",
        "classes that are not among the published: unicorn",
    ]
    for said in data.differences:
        assert f"caltech101, test: {said}" in caplog.text


def test_the_published_classes_are_coops():
    """As they are counted in `split_zhou_Caltech101.json` and `split_zhou_EuroSAT.json`."""
    for name in ("caltech101", "eurosat"):
        assert len(ELEVEN[name].published) == ELEVEN[name].about.classes
    assert {"Faces", "airplanes", "yin_yang"} < ELEVEN["caltech101"].published
    assert not {"Faces_easy", "BACKGROUND_Google"} & ELEVEN["caltech101"].published


def test_a_copy_without_any_of_its_images_says_what_is_expected(tmp_path):
    built = BUILDERS["stanford_cars"](tmp_path, "official")
    shutil.rmtree(built.root / "cars_test")
    for option in ("error", "skip"):
        with pytest.raises(FileNotFoundError) as caught:
            ELEVEN["stanford_cars"](built.root, on_bad_image=option)
        said = str(caught.value)
        assert said.startswith(f"none of the 9 images that {built.root}/cars_test_annos_withlabels")
        assert "expected cars_train/, cars_test/" in said
        assert "skip" not in said
    assert len(ELEVEN["stanford_cars"](built.root, "train")) == 18

"""The eleven published datasets of the benchmark, in the layouts in which they are distributed.

`DATASETS` is their table: the name of `conf/dataset/<name>.yaml` and of the folder under
`paths.data_dir` -> the class, whose `about` states sources, licences and published sizes.
"""

import logging
import re
from pathlib import Path

from open_clip import IMAGENET_CLASSNAMES

from clipsae.data.image_folder import wnids
from clipsae.data.listing import folders_in
from clipsae.data.published.annotations import (
    Split,
    by_class,
    images_in,
    names_in,
    read_fields,
    read_json,
    read_lines,
    read_mat,
    unwrapped,
)
from clipsae.data.published.base import COOP, DatasetInfo, PublishedDataset

log = logging.getLogger(__name__)


class Caltech101(PublishedDataset):
    """Caltech101: photos of 101 kinds of objects, 40 to 800 each (Fei-Fei et al., 2004).

    The benchmark has 100 classes, as CoOp: without the background's pictures and without
    `Faces_easy`, which are the same faces cut out. Classes are the folders in ASCII order, capitals
    first; the paper's code paired them with names in another order. Some copies have the class
    folders at the top.
    """

    about = DatasetInfo(
        name="caltech101",
        title="Caltech101",
        layout="101_ObjectCategories/<class>/<image>.jpg, better with split_zhou_Caltech101.json",
        source="https://data.caltech.edu/records/mzrjq-6wc02",
        licence="CC BY 4.0",
        classes=100,
        official=(4_128, 2_465),
        coop=(4_128, 2_465),
        split_file="split_zhou_Caltech101.json",
        prompt="a photo of a {}.",
        zero_shot=93.55,
        own_split="fixed rule",
        images=("101_ObjectCategories", "."),
        class_folders=frozenset(
            """
            Faces Leopards Motorbikes accordion airplanes anchor ant barrel bass beaver binocular
            bonsai brain brontosaurus buddha butterfly camera cannon car_side ceiling_fan cellphone
            chair chandelier cougar_body cougar_face crab crayfish crocodile crocodile_head cup
            dalmatian dollar_bill dolphin dragonfly electric_guitar elephant emu euphonium ewer
            ferry flamingo flamingo_head garfield gerenuk gramophone grand_piano hawksbill headphone
            hedgehog helicopter ibis inline_skate joshua_tree kangaroo ketch lamp laptop llama
            lobster lotus mandolin mayfly menorah metronome minaret nautilus octopus okapi pagoda
            panda pigeon pizza platypus pyramid revolver rhino rooster saxophone schooner scissors
            scorpion sea_horse snoopy soccer_ball stapler starfish stegosaurus stop_sign strawberry
            sunflower tick trilobite umbrella watch water_lilly wheelchair wild_cat windsor_chair
            wrench yin_yang
            """.split()  # noqa: SIM905 - a list would take a hundred lines
        ),
        not_classes=("BACKGROUND_Google", "Faces_easy"),
        names={
            "airplanes": "airplane",
            "Faces": "face",
            "Leopards": "leopard",
            "Motorbikes": "motorbike",
        },
        torchvision="Caltech101",
    )


class DTD(PublishedDataset):
    """DTD, the Describable Textures Dataset: 47 textures, 120 images each (Cimpoi et al., 2014).

    Official is the first of its ten partitions: 40 images a class in each part.
    """

    about = DatasetInfo(
        name="dtd",
        title="DTD",
        layout="images/<class>/<image>.jpg and labels/train1.txt, or "
        "split_zhou_DescribableTextures.json beside images/",
        source="https://www.robots.ox.ac.uk/~vgg/data/dtd",
        licence="research only",
        classes=47,
        official=(1_880, 1_880),
        coop=(2_820, 1_692),
        split_file="split_zhou_DescribableTextures.json",
        prompt="{} texture.",
        zero_shot=45.04,
        folders=("dtd-r1.0.1", "describable textures dataset dtd"),
        torchvision="DTD",
    )

    def official(self, split: str) -> Split:
        path = self.annotation(f"labels/{split}1.txt")
        files = read_lines(path)
        classes = [file.split("/")[0] for file in files]
        return by_class(files, classes, sorted(set(classes)), path)


class EuroSAT(PublishedDataset):
    """EuroSAT: 27,000 satellite images of 64 x 64 pixels, ten kinds of land (Helber et al., 2019).

    Newer archives call the folder `2750` `EuroSAT_RGB`.
    """

    about = DatasetInfo(
        name="eurosat",
        title="EuroSAT",
        layout="2750/<class>/<image>.jpg, better with split_zhou_EuroSAT.json",
        source="https://github.com/phelber/EuroSAT",
        licence="MIT",
        classes=10,
        official=(13_500, 8_100),
        coop=(13_500, 8_100),
        split_file="split_zhou_EuroSAT.json",
        prompt="a centered satellite photo of {}.",
        zero_shot=50.42,
        own_split="fixed rule",
        folders=("EuroSAT_RGB", "eurosat-dataset"),
        images=("2750", "EuroSAT_RGB", "."),
        class_folders=frozenset(
            (
                *("AnnualCrop", "Forest", "HerbaceousVegetation", "Highway", "Industrial"),
                *("Pasture", "PermanentCrop", "Residential", "River", "SeaLake"),
            )
        ),
        names={
            "AnnualCrop": "Annual Crop Land",
            "HerbaceousVegetation": "Herbaceous Vegetation Land",
            "Highway": "Highway or Road",
            "Industrial": "Industrial Buildings",
            "Pasture": "Pasture Land",
            "PermanentCrop": "Permanent Crop Land",
            "Residential": "Residential Buildings",
            "SeaLake": "Sea or Lake",
        },
        torchvision="EuroSAT",
    )

    @classmethod
    def holds_classes(cls, folder: Path) -> bool:
        """The archive of all 13 bands has the same folders, of .tif files."""
        classes = cls.about.class_folders.intersection(folders_in(folder))
        names = (name.lower() for inside in classes for name in names_in(folder / inside))
        return any(name.endswith((".jpg", ".jpeg", ".png")) for name in names)


class FGVCAircraft(PublishedDataset):
    """FGVC-Aircraft: 10,000 photos of 100 variants of aircraft (Maji et al., 2013)."""

    about = DatasetInfo(
        name="fgvc_aircraft",
        title="FGVC-Aircraft",
        layout="images/<number>.jpg, variants.txt and images_variant_{train,test}.txt, "
        "there or in data/",
        source="https://www.robots.ox.ac.uk/~vgg/data/fgvc-aircraft",
        licence="non-commercial research",
        classes=100,
        official=(3_334, 3_333),
        prompt="a photo of a {}, a type of aircraft.",
        zero_shot=23.22,
        folders=("fgvc-aircraft-2013b",),
        torchvision="FGVCAircraft",
    )

    def official(self, split: str) -> Split:
        path = self.annotation(f"images_variant_{split}.txt")
        rows = read_fields(path, "number variant")
        variants = self.annotation("variants.txt")
        files, classes = [f"{row[0]}.jpg" for row in rows], [row[1] for row in rows]
        return by_class(files, classes, read_lines(variants), path, index_file=variants)

    def clean(self, raw: str) -> str:
        return raw


class Food101(PublishedDataset):
    """Food-101: 101 dishes, 1,000 photos each (Bossard et al., 2014).

    CoOp's split is another one, with more test images.
    """

    about = DatasetInfo(
        name="food101",
        title="Food-101",
        layout="images/<class>/<number>.jpg and meta/{train,test}.json, or "
        "split_zhou_Food101.json beside images/",
        source="https://data.vision.ee.ethz.ch/cvl/datasets_extra/food-101",
        licence="fair use in research",
        classes=101,
        official=(75_750, 25_250),
        coop=(50_500, 30_300),
        split_file="split_zhou_Food101.json",
        prompt="a photo of {}, a type of food.",
        zero_shot=82.86,
        torchvision="Food101",
    )

    def official(self, split: str) -> Split:
        path = self.annotation(f"meta/{split}.json")
        content = read_json(path)
        if not isinstance(content, dict) or not all(isinstance(v, list) for v in content.values()):
            raise ValueError(f"{path} is not a list of images for each class: download it again")
        index = sorted(content)
        files = [f"{file}.jpg" for name in index for file in content[name]]
        return by_class(files, [name for name in index for _ in content[name]], index, path)


class ImageNet(PublishedDataset):
    """ImageNet-1k (Russakovsky et al., 2015): labels 0..999 are the wnids in order, names are
    open_clip's (those of CLIP's authors). Test is `val`. Some of the classes may be missing.

    CoOp has both splits in `images/`, the challenge's archive in `ILSVRC/Data/CLS-LOC/`. Kaggle's
    copy of that archive has `val/*.JPEG` unsorted, and their wnids in `LOC_val_solution.csv`.
    """

    about = DatasetInfo(
        name="imagenet",
        title="ImageNet",
        layout="train/<wnid>/<image>.JPEG and val/<wnid>/<image>.JPEG, there or in images/",
        source="https://image-net.org",
        licence="non-commercial research",
        classes=1_000,
        official=(1_281_167, 50_000),
        prompt="a photo of a {}.",
        zero_shot=68.34,
        folders=("imagenet-1k", "ILSVRC2012", "ILSVRC"),
    )

    @classmethod
    def images_of(cls, home: Path) -> Path | None:
        """The challenge's archive has other folders of these names, without images."""
        for folder in (unwrapped(home / "train"), unwrapped(home / "val")):
            if images_in(folder) or any(images_in(folder / wnid) for wnid in _wnids_in(folder)):
                return home
        return None

    def official(self, split: str) -> Split:
        images = self.place.images
        folder = unwrapped(images / ("train" if split == "train" else "val"))
        if not folder.is_dir():
            raise FileNotFoundError(
                f"{folder} is missing: {self.about.title}'s {split} split is expected in it, "
                f"one folder for each of the 1,000 wnids"
            )
        prefix = f"{folder.relative_to(images).as_posix()}/"
        solution = self.place.file("LOC_val_solution.csv") if split == "test" else None
        if solution is None or _wnids_in(folder):
            return _list_wnids(folder, prefix)
        rows = [re.split("[, ]", line) for line in sorted(read_lines(solution)[1:])]
        files = [f"{prefix}{image}.JPEG" for image, *_ in rows]
        return by_class(files, [row[1] if len(row) > 1 else "" for row in rows], wnids(), solution)

    def clean(self, raw: str) -> str:
        return IMAGENET_CLASSNAMES[wnids().index(raw)]


class ImageNetSketch(ImageNet):
    """ImageNet-Sketch: ImageNet's classes as drawings (Wang et al., 2019). It has one split, which
    is both train and test."""

    about = DatasetInfo(
        name="imagenet_sketch",
        title="ImageNet-Sketch",
        layout="<wnid>/<image>.JPEG, there or in images/ or sketch/",
        source="https://github.com/HaohanWang/ImageNet-Sketch",
        licence="images from the web; research",
        classes=1_000,
        official=(50_889, 50_889),
        prompt="a photo of a {}.",
        zero_shot=48.24,
        folders=("sketch",),
    )

    @classmethod
    def images_of(cls, home: Path) -> Path | None:
        folders = (home / "images", home / "sketch", home)
        return next((folder for folder in folders if _wnids_in(folder)), None)

    def official(self, split: str) -> Split:
        if split == "train":
            log.warning(
                "imagenet_sketch has one split: train has the same images as test, so results on "
                "train are not held out"
            )
        return _list_wnids(self.place.images)


class OxfordPets(PublishedDataset):
    """Oxford-IIIT Pet: 37 breeds of cats and dogs, about 200 photos each (Parkhi et al., 2012).

    Official train is `trainval`; CoOp's is four fifths of that. Cats are spelled with a capital,
    dogs without; CoOp's names are lower case.
    """

    about = DatasetInfo(
        name="oxford_pets",
        title="Oxford-IIIT Pet",
        layout="images/<Breed>_<n>.jpg and annotations/{trainval,test}.txt",
        source="https://www.robots.ox.ac.uk/~vgg/data/pets",
        licence="CC BY-SA 4.0",
        classes=37,
        official=(3_680, 3_669),
        coop=(2_944, 3_669),
        split_file="split_zhou_OxfordPets.json",
        prompt="a photo of a {}, a type of pet.",
        zero_shot=86.92,
        folders=("oxford-iiit-pet", "oxford-iiit-pets", "pets"),
        torchvision="OxfordIIITPet",
    )

    def official(self, split: str) -> Split:
        path = self.annotation(f"annotations/{'trainval' if split == 'train' else split}.txt")
        rows = read_fields(path, "image class species breed")
        breeds = {number: self.raw_name(image, "") for image, number, *_ in rows}
        index = [str(number) for number in range(1, len(breeds) + 1)]
        if set(breeds) != set(index):
            raise ValueError(f"{path}: classes must be 1, 2, ... without gaps: download it again")
        files, classes = [f"{row[0]}.jpg" for row in rows], [row[1] for row in rows]
        return by_class(files, classes, index, path, raw=[breeds[number] for number in index])

    def clean(self, raw: str) -> str:
        return super().clean(raw).lower()

    def raw_name(self, file: str, name: str) -> str:
        """For example "great_pyrenees_12.jpg" -> "great_pyrenees"."""
        return file.rpartition("_")[0]


class StanfordCars(PublishedDataset):
    """Stanford Cars: 16,185 photos of 196 models (Krause et al., 2013).

    The year ends a name; CoOp puts it first.
    """

    about = DatasetInfo(
        name="stanford_cars",
        title="Stanford Cars",
        layout="cars_train/, cars_test/, devkit/cars_train_annos.mat, devkit/cars_meta.mat and "
        "cars_test_annos_withlabels.mat, or split_zhou_StanfordCars.json in place of the .mat",
        source=f"the copies listed in {COOP}; its own page is dead",
        licence="non-commercial research",
        classes=196,
        official=(8_144, 8_041),
        coop=(6_509, 8_041),
        split_file="split_zhou_StanfordCars.json",
        prompt="a photo of a {}.",
        zero_shot=66.11,
        folders=("stanford-cars-dataset", "cars"),
    )

    @classmethod
    def images_of(cls, home: Path) -> Path | None:
        return home if any((home / f"cars_{s}").is_dir() for s in ("train", "test")) else None

    def official(self, split: str) -> Split:
        meta = self.annotation("devkit/cars_meta.mat")
        models = [str(name) for name in read_mat(meta, "class_names")]
        files = {"train": "devkit/cars_train_annos.mat", "test": "cars_test_annos_withlabels.mat"}
        path = self.annotation(files[split])
        annotations = read_mat(path, "annotations")
        try:
            images = [f"cars_{split}/{row['fname']}" for row in annotations]
            numbers = [int(row["class"]) for row in annotations]
        except (ValueError, IndexError, TypeError) as error:
            raise ValueError(
                f"{path}: its annotations have no 'fname' and 'class' ({error}): download it again"
            ) from error
        index = range(1, len(models) + 1)
        return by_class(images, numbers, index, path, index_file=meta, raw=models)

    def clean(self, raw: str) -> str:
        """For example "Acura RL Sedan 2012" -> "2012 Acura RL Sedan"."""
        model, _, year = raw.rpartition(" ")
        return f"{year} {model}"

    def raw_name(self, file: str, name: str) -> str:
        year, _, model = name.partition(" ")
        return f"{model} {year}"


class SUN397(PublishedDataset):
    """SUN397: 108,754 photos of 397 kinds of scenes (Xiao et al., 2010).

    Official is the first of ten partitions, 50 images a class each; CoOp's is based on it.
    """

    about = DatasetInfo(
        name="sun397",
        title="SUN397",
        layout="SUN397/<letter>/<scene>/<image>.jpg, and split_zhou_SUN397.json or the "
        "Training_01.txt and Testing_01.txt of Partitions.zip",
        source="https://vision.princeton.edu/projects/2010/SUN",
        licence="research; the images are their owners'",
        classes=397,
        official=(19_850, 19_850),
        coop=(15_880, 19_850),
        split_file="split_zhou_SUN397.json",
        prompt="a photo of a {}.",
        zero_shot=65.63,
        in_data_folder=True,
        torchvision="SUN397",
    )

    @classmethod
    def images_of(cls, home: Path) -> Path | None:
        """The folder of letters: SUN397, or `home` itself."""
        folders = (unwrapped(home / "SUN397"), home)
        return next((folder for folder in folders if (folder / "a").is_dir()), None)

    def official(self, split: str) -> Split:
        names = self.annotation("ClassName.txt", "Partitions/ClassName.txt")
        name = {"train": "Training_01.txt", "test": "Testing_01.txt"}[split]
        path = self.annotation(name, f"Partitions/{name}")
        index = [line.lstrip("/") for line in read_lines(names)]
        files = [line.lstrip("/") for line in read_lines(path)]
        raw = [scene.partition("/")[2] for scene in index]
        classes = [file.rpartition("/")[0] for file in files]
        return by_class(files, classes, index, path, index_file=names, raw=raw)

    def clean(self, raw: str) -> str:
        """For example "church/indoor" -> "indoor church"."""
        return super().clean(" ".join(reversed(raw.split("/"))))

    def raw_name(self, file: str, name: str) -> str:
        """For example "c/church/indoor/sun_x.jpg" -> "church/indoor"."""
        return "/".join(file.split("/")[1:-1])


class UCF101(PublishedDataset):
    """UCF101, middle frames: 13,320 videos of 101 actions, one frame each (Soomro et al., 2012).

    Official is the first of three lists, whose lines are "ActionName/v_....avi"; folders of frames
    may be spelled Action_Name.
    """

    about = DatasetInfo(
        name="ucf101",
        title="UCF101 (middle frames)",
        layout="UCF-101-midframes/<Action_Name>/<video>.jpg, and split_zhou_UCF101.json or "
        "ucfTrainTestlist/{classInd,trainlist01,testlist01}.txt, the train/test splits of "
        "https://www.crcv.ucf.edu/data/UCF101.php",
        source=f"UCF-101-midframes.zip in {COOP}",
        licence="none stated; research",
        classes=101,
        official=(9_537, 3_783),
        coop=(7_639, 3_783),
        split_file="split_zhou_UCF101.json",
        prompt="a photo of a person doing {}.",
        zero_shot=65.16,
        images=("UCF-101-midframes",),
    )

    def official(self, split: str) -> Split:
        numbered = self.annotation("ucfTrainTestlist/classInd.txt")
        index = [name for _, name in read_fields(numbered, "index action")]
        path = self.annotation(f"ucfTrainTestlist/{split}list01.txt")
        videos = [line.split()[0].partition("/") for line in read_lines(path)]
        actions = [action for action, _, _ in videos]
        folders = {name.replace("_", ""): name for name in folders_in(self.place.images)}
        files = [f"{folders.get(a, a)}/{Path(video).stem}.jpg" for a, _, video in videos]
        return by_class(files, actions, index, path, index_file=numbered)

    def clean(self, raw: str) -> str:
        """For example "ApplyEyeMakeup" -> "Apply Eye Makeup"."""
        return " ".join(re.findall("[A-Z][^A-Z]*", raw)) or raw

    def raw_name(self, file: str, name: str) -> str:
        return file.split("/")[0].replace("_", "")


def _wnids_in(folder: Path) -> list[str]:
    """The folders named like wnids, sorted."""
    names = folders_in(folder) if folder.is_dir() else []
    return [name for name in names if name[0] == "n" and name[1:].isdigit()]


def _list_wnids(folder: Path, prefix: str = "") -> Split:
    """The images in folders of wnids, paths prefixed. No `stat` of an image: seconds for 1.28
    million on a local disk.

    Raises:
        ValueError: no folders of wnids, or one that is not ImageNet-1k's.
    """
    found = _wnids_in(folder)
    if unknown := set(found) - set(wnids()):
        raise ValueError(f"{folder / min(unknown)}: {min(unknown)} is not a wnid of ImageNet-1k")
    if not found:
        flat = (
            ", only images: sort them into one folder a class first, or put Kaggle's "
            "LOC_val_solution.csv beside" * bool(images_in(folder))
        )
        raise ValueError(f"{folder} holds no folders of wnids such as n01440764{flat}")
    pairs = [
        (f"{prefix}{name}/{image}", name) for name in found for image in images_in(folder / name)
    ]
    return by_class([file for file, _ in pairs], [name for _, name in pairs], wnids())


DATASETS: dict[str, type[PublishedDataset]] = {
    cls.about.name: cls
    for cls in (
        *(Caltech101, DTD, EuroSAT, FGVCAircraft, Food101, ImageNet, ImageNetSketch, OxfordPets),
        *(StanfordCars, SUN397, UCF101),
    )
}

"""The eleven datasets at toy size in the layouts that people have them in.

"coop" is CoOp's tree with its split files, "official" what torchvision makes, or the archives as
they come; a few of the real classes each. Each builder returns what a loader should find, stated
here by hand.
"""

import json
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
from scipy.io import savemat

from tests.data.eleven.layouts import (
    Built,
    by_rule,
    coop_file,
    from_parts,
    parts_of,
    save_cars,
    save_image,
    save_parts,
    write,
)


def caltech101(data: Path, layout: str) -> Built:
    folders = ["Faces", "Leopards", "airplanes", "ceiling_fan"]
    clean = ["face", "leopard", "airplane", "ceiling fan"]
    root = data / "caltech101"
    home = data / "caltech-101" if layout == "coop" else root
    images = home / "101_ObjectCategories"
    names = ["face", "leopard", "airplane", "ceiling_fan"]
    parts = parts_of(folders, names, lambda c, n: f"{c}/image_{n:04d}.jpg", (5, 2, 3))
    save_parts(images, parts)
    for other in ("BACKGROUND_Google", "Faces_easy"):
        save_image(images / other / "image_0001.jpg", 9)
    save_image(images / "Faces" / "image_0002.jpg", 0, mode="L")  # some are grey
    if layout == "coop":
        coop_file(home / "split_zhou_Caltech101.json", parts["train"], parts["val"], parts["test"])
        return from_parts(root, folders, clean, "coop", parts)
    return by_rule(root, folders, clean)


def dtd(data: Path, layout: str) -> Built:
    folders = ["banded", "knitted", "polka-dotted"]
    root = data / "dtd"
    home = root if layout == "coop" else root / "dtd"
    parts = parts_of(folders, folders, lambda c, n: f"{c}/{c}_{n:04d}.jpg")
    save_parts(home / "images", parts)
    for part, entries in parts.items():
        write(home / "labels" / f"{part}1.txt", [file for file, *_ in entries])
    if layout == "coop":
        name = "split_zhou_DescribableTextures.json"
        parts["test"], parts["train"] = parts["train"], parts["test"]  # another split than DTD's
        coop_file(home / name, parts["train"], parts["val"], parts["test"])
    return from_parts(root, folders, folders, layout, parts)


def eurosat(data: Path, layout: str) -> Built:
    folders = ["AnnualCrop", "Highway", "SeaLake"]
    clean = ["Annual Crop Land", "Highway or Road", "Sea or Lake"]
    root = data / "eurosat"
    home = root if layout == "coop" else root / "eurosat"
    parts = parts_of(folders, clean, lambda c, n: f"{c}/{c}_{n}.jpg", (5, 2, 3))
    save_parts(home / "2750", parts)
    if layout == "coop":
        coop_file(home / "split_zhou_EuroSAT.json", parts["train"], parts["val"], parts["test"])
        return from_parts(root, folders, clean, "coop", parts)
    return by_rule(root, folders, clean)


def fgvc_aircraft(data: Path, layout: str) -> Built:
    variants = ["707-320", "F/A-18", "Cessna 172", "Boeing 717"]
    root = data / "fgvc_aircraft"
    home = root if layout == "coop" else data / "fgvc-aircraft-2013b" / "data"
    parts = parts_of(variants, variants, lambda c, n: f"{variants.index(c)}{n:06d}.jpg")
    save_parts(home / "images", parts)
    write(home / "variants.txt", variants)
    for part, entries in parts.items():
        lines = [f"{file.removesuffix('.jpg')} {name}" for file, _, name in entries]
        write(home / f"images_variant_{part}.txt", lines)
    return from_parts(root, variants, variants, "official", parts)


def food101(data: Path, layout: str) -> Built:
    folders = ["apple_pie", "bibimbap", "french_fries"]
    clean = ["apple pie", "bibimbap", "french fries"]
    root = data / "food101"
    home = data / "food-101"
    parts = parts_of(folders, folders, lambda c, n: f"{c}/{1000 + n}.jpg")
    save_parts(home / "images", parts)
    if layout == "coop":
        coop_file(home / "split_zhou_Food101.json", parts["train"], parts["val"], parts["test"])
    parts_official = {"train": parts["train"] + parts["val"], "test": parts["test"]}
    (home / "meta").mkdir(parents=True, exist_ok=True)
    for split, entries in parts_official.items():
        # The archive's own files name the classes in no order.
        content = {
            folder: [f.removesuffix(".jpg") for f, _, name in entries if name == folder]
            for folder in reversed(folders)
        }
        (home / "meta" / f"{split}.json").write_text(json.dumps(content))
    write(home / "meta" / "classes.txt", folders)
    if layout == "coop":
        return from_parts(root, folders, clean, "coop", parts)
    ordered = {s: sorted(e, key=lambda entry: entry[1]) for s, e in parts_official.items()}
    return from_parts(root, folders, clean, "official", ordered)


WNIDS = {
    "n01440764": (0, "tench"),
    "n02099601": (207, "Golden Retriever"),
    "n03495258": (594, "harp"),
    "n04356056": (837, "sunglasses"),
    "n04355933": (836, "sunglasses"),
}


def imagenet(data: Path, layout: str) -> Built:
    root = data / "imagenet"
    home = root / "images" if layout == "coop" else root
    files: dict[str, list[str]] = {"train": [], "test": []}
    labels: dict[str, list[int]] = {"train": [], "test": []}
    for wnid, (label, _) in sorted(WNIDS.items()):
        for split, folder, count in (("train", "train", 16), ("test", "val", 2)):
            for n in range(count):
                stem = (
                    f"{wnid}_{10 + n}"
                    if split == "train"
                    else f"ILSVRC2012_val_{label * 10 + n:08d}"
                )
                file = f"{folder}/{wnid}/{stem}.JPEG"
                mode = "CMYK" if (wnid, n) == ("n01440764", 0) else "RGB"  # a few are
                save_image(home / file, label, mode)
                files[split].append(file)
                labels[split].append(label)
    return Built(root, [], [], files, labels, "official")


def imagenet_sketch(data: Path, layout: str) -> Built:
    root = data / "imagenet_sketch"
    home = data / "imagenet-sketch" / "images" if layout == "coop" else root / "sketch"
    files, labels = [], []
    for wnid, (label, _) in sorted(WNIDS.items()):
        for n in range(3):
            save_image(home / wnid / f"sketch_{n}.JPEG", label, "L")
            files.append(f"{wnid}/sketch_{n}.JPEG")
            labels.append(label)
    both = ("train", "test")
    return Built(root, [], [], dict.fromkeys(both, files), dict.fromkeys(both, labels), "official")


def oxford_pets(data: Path, layout: str) -> Built:
    raw = ["Abyssinian", "american_bulldog", "Bengal"]
    clean = ["abyssinian", "american bulldog", "bengal"]
    root = data / "oxford_pets"
    home = root if layout == "coop" else data / "oxford-iiit-pet"
    names = [name.lower() for name in raw]
    parts = parts_of(raw, names, lambda c, n: f"{c}_{n * 13}.jpg")
    save_parts(home / "images", parts)
    trainval = sorted(parts["train"] + parts["val"])
    for name, entries in (("trainval", trainval), ("test", parts["test"])):
        write(
            home / "annotations" / f"{name}.txt",
            [f"{file.removesuffix('.jpg')} {label + 1} 1 1" for file, label, _ in entries],
        )
    if layout == "coop":
        coop_file(home / "split_zhou_OxfordPets.json", parts["train"], parts["val"], parts["test"])
        return from_parts(root, raw, clean, "coop", parts)
    official = {"train": trainval, "test": parts["test"]}
    return from_parts(root, raw, clean, "official", official)


def stanford_cars(data: Path, layout: str) -> Built:
    raw = ["AM General Hummer SUV 2000", "Acura RL Sedan 2012", "Ram C/V Cargo Van Minivan 2012"]
    clean = ["2000 AM General Hummer SUV", "2012 Acura RL Sedan", "2012 Ram C/V Cargo Van Minivan"]
    root = data / "stanford_cars"
    trained = parts_of(raw, clean, lambda c, n: f"cars_train/{raw.index(c)}{n:04d}.jpg", (4, 2, 0))
    tested = parts_of(raw, clean, lambda c, n: f"cars_test/{raw.index(c)}{n:04d}.jpg", (0, 0, 3))
    parts = {"train": trained["train"], "val": trained["val"], "test": tested["test"]}
    save_parts(root, parts)
    official = {"train": sorted(parts["train"] + parts["val"]), "test": parts["test"]}
    if layout == "coop":
        coop_file(
            root / "split_zhou_StanfordCars.json", parts["train"], parts["val"], parts["test"]
        )
    (root / "devkit").mkdir()
    names = np.empty((1, len(raw)), dtype=object)
    names[0] = raw
    savemat(root / "devkit" / "cars_meta.mat", {"class_names": names})
    save_cars(root / "devkit" / "cars_train_annos.mat", official["train"])
    save_cars(root / "cars_test_annos_withlabels.mat", official["test"])
    return from_parts(root, raw, clean, layout, parts if layout == "coop" else official)


def sun397(data: Path, layout: str) -> Built:
    folders = ["a/abbey", "a/airport_terminal", "c/church/indoor", "c/church/outdoor"]
    raw = ["abbey", "airport_terminal", "church/indoor", "church/outdoor"]
    clean = ["abbey", "airport terminal", "indoor church", "outdoor church"]
    root = data / "sun397"
    home = root if layout == "coop" else data
    names = ["abbey", "airport_terminal", "indoor church", "outdoor church"]
    parts = parts_of(folders, names, lambda c, n: f"{c}/sun_{zlib.crc32(c.encode())}{n}.jpg")
    save_parts(home / "SUN397", parts)
    write(home / "SUN397" / "ClassName.txt", [f"/{folder}" for folder in folders])
    official = {"train": parts["train"] + parts["val"], "test": parts["test"]}
    if layout == "coop":
        coop_file(home / "split_zhou_SUN397.json", parts["train"], parts["val"], parts["test"])
        return from_parts(root, raw, clean, "coop", parts)
    for name, split in (("Training_01", "train"), ("Testing_01", "test")):
        write(home / "Partitions" / f"{name}.txt", [f"/{file}" for file, *_ in official[split]])
    return from_parts(root, raw, clean, "official", official)


def ucf101(data: Path, layout: str) -> Built:
    raw = ["ApplyEyeMakeup", "HandstandPushups", "YoYo"]
    folders = ["Apply_Eye_Makeup", "Handstand_Pushups", "Yo_Yo"]
    clean = ["Apply Eye Makeup", "Handstand Pushups", "Yo Yo"]
    root = data / "ucf101"

    def file(folder: str, n: int) -> str:
        action = raw[folders.index(folder)]
        action = {"HandstandPushups": "HandStandPushups"}.get(action, action)  # so in the archive
        return f"{folder}/v_{action}_g{n:02d}_c01.jpg"

    parts = parts_of(folders, folders, file)
    save_parts(root / "UCF-101-midframes", parts)
    official = {"train": parts["train"] + parts["val"], "test": parts["test"]}
    if layout == "coop":
        coop_file(root / "split_zhou_UCF101.json", parts["train"], parts["val"], parts["test"])
        return from_parts(root, raw, clean, "coop", parts)
    lists = root / "ucfTrainTestlist"
    write(lists / "classInd.txt", [f"{i} {name}" for i, name in enumerate(raw, start=1)])
    for split, entries in official.items():
        lines = []
        for path, label, _ in entries:
            video = f"{raw[label]}/{Path(path).stem}.avi"
            lines.append(f"{video} {label + 1}" if split == "train" else video)
        write(lists / f"{split}list01.txt", lines)
    return from_parts(root, raw, clean, "official", official)


BUILDERS: dict[str, Callable[[Path, str], Built]] = {
    builder.__name__: builder
    for builder in (
        caltech101,
        dtd,
        eurosat,
        fgvc_aircraft,
        food101,
        imagenet,
        imagenet_sketch,
        oxford_pets,
        stanford_cars,
        sun397,
        ucf101,
    )
}
LAYOUTS = ("coop", "official")

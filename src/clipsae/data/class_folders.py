"""Finds the class folders of a folder: splits by their usual names, folders that only wrap others,
folders that are no class."""

import os
import re
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from clipsae.data.listing import folders_in, has_images

# What split folders are called, in any case and with "set", "images" and the like beside it. The
# first that is there is taken: `test` before `val`, and `train`, which holds no `val`, before
# `trainval`.
_SPLIT_WORDS = {
    "train": ("train", "training", "trainset", "trainval"),
    "test": (
        *("test", "testing", "testset", "val", "valid", "validation", "valset"),
        *("dev", "devset", "eval", "evaluation", "holdout", "heldout"),
    ),
}
_FILLERS = ("set", "split", "data", "dataset", "image", "images", "img", "imgs", "folder")


@dataclass(frozen=True)
class ClassFolders:
    """The splits and classes of a root.

    Attributes:
        splits: for "train" and "test" the folder of the class folders, the same for both if there
            is one split only.
        classes: for each split the class folders with images in it, sorted.
        top: the folder of the split folders or, without splits, of the classes.
        doubt: why the classes are likely to be other folders, a sentence or "".
    """

    splits: dict[str, Path]
    classes: dict[str, list[str]]
    top: Path
    doubt: str = ""

    @property
    def one_split(self) -> bool:
        """Whether both splits are the same images."""
        return self.splits["train"] == self.splits["test"]

    @property
    def all_classes(self) -> list[str]:
        """The class folders that have images in any split, sorted."""
        return sorted({name for names in self.classes.values() for name in names})

    def beside(self, split: str) -> list[Path]:
        """Folders that are neither a split nor a class of this one."""
        classes = {self.splits[split] / name for name in self.all_classes}
        found = []
        for folder in sorted({self.top, self.splits[split]}):
            with os.scandir(folder) as entries:
                names = sorted(e.name for e in entries if e.is_dir() and e.name[0] != ".")
            found += [folder / name for name in names if folder / name not in classes]
        used = self.splits.values()
        return [path for path in found if not any(at.is_relative_to(path) for at in used)]


def find_class_folders(root: Path) -> ClassFolders:
    """Find the splits of a root, and the classes of each.

    Raises:
        ValueError: no class folders, splits without any, or several folders of splits to choose
            from.
    """
    top = _unwrapped(root)
    names = _with_images(top)
    if not names:
        raise ValueError(_why_none(root))
    found = _splits(top, names)
    if not found:
        _refuse_splits(top, names)
        same = dict.fromkeys(_SPLIT_WORDS, top)
        return ClassFolders(same, dict.fromkeys(same, names), top, _doubt(top, names))
    others = [name for name in names if not _split_word(name)]
    if len(found) == 1 and others:
        ((name, *_),) = found.values()
        raise ValueError(
            f"{top} holds {name}/ with class folders in it, and {others[0]}/ beside it: "
            f"use dataset.root={top / name}, or call the other split test"
        )
    splits: dict[str, Path] = {}
    classes: dict[str, list[str]] = {}
    for split, candidates in found.items():  # train first
        for name in candidates:
            folder = _unwrapped(top / name, splits=False)
            inside = _with_images(folder)
            # `val/images` beside a training split with other classes has no labels.
            train = classes.get("train", [])
            unlabelled = len(inside) == 1 and len(train) > 1 and inside[0] not in train
            if split not in splits and not unlabelled:
                splits[split], classes[split] = folder, inside
    (only, *_) = splits
    splits = {split: splits.get(split, splits[only]) for split in _SPLIT_WORDS}
    classes = {split: classes.get(split, classes[only]) for split in _SPLIT_WORDS}
    _refuse_two_spellings(root, classes)
    return ClassFolders(splits, classes, top, _doubt(splits[only], classes[only]))


def _refuse_two_spellings(root: Path, classes: dict[str, list[str]]) -> None:
    """ValueError for `train/Black` and `test/black`: two classes of one name."""
    train = {words(name).lower(): name for name in {*classes["train"]} - {*classes["test"]}}
    for name in sorted({*classes["test"]} - {*classes["train"]}):
        if other := train.get(words(name).lower()):
            raise ValueError(
                f"{root}: a class is spelled {other} in the training split and {name} in the test "
                "split: give its folders one name"
            )


def _splits(folder: Path, names: list[str]) -> dict[str, list[str]]:
    """The folders among `names` that are splits of class folders, those of "train" and of "test"
    by preference."""
    called: dict[str, dict[str, list[tuple[int, str]]]] = {}
    for name in names:
        if (meaning := _split_word(name)) and _holds_classes(folder / name):
            split, rank, rest = meaning
            called.setdefault(rest, {}).setdefault(split, []).append((rank, name))
    # "birds_train" is a split where "birds_test" is there, too.
    found = called.pop("", {})
    if not found:
        found = next((pair for pair in called.values() if len(pair) == 2), {})
    return {s: [name for _, name in sorted(found[s])] for s in _SPLIT_WORDS if s in found}


def _split_word(name: str) -> tuple[str, int, str] | None:
    """The split that a folder's name means, the rank of the word, and what else is in the name;
    None where it means none, or several."""
    spaced = " ".join(re.findall(r"[^\W\d_]+|\d+", words(name).lower()))
    spaced = re.sub(r"^\d+ ", "", spaced)  # `01-train`
    parts = re.sub(r"\btrain (val|valid|validation)\b", "trainval", spaced).split()
    found = [
        (split, ranked.index(part), part)
        for part in parts
        for split, ranked in _SPLIT_WORDS.items()
        if part in ranked
    ]
    if len(found) != 1:
        return None
    split, rank, part = found[0]
    return split, rank, " ".join(p for p in parts if p != part and p not in _FILLERS)


def _holds_classes(folder: Path) -> bool:
    """Whether there are class folders in a split: `test/test/1.jpg` has no labels."""
    inside = _with_images(_unwrapped(folder, splits=False))
    return len(inside) > 1 or any(not _split_word(name) for name in inside)


def _unwrapped(folder: Path, splits: bool = True) -> Path:
    """The folder that holds several class folders, or with `splits` a split: the given one, or the
    one that folders with one folder each lead to, as archives unpack into `birds/birds/...`."""
    inner = folder
    while len(names := _with_images(inner)) == 1:
        if splits and _splits(inner, names):
            return inner
        inner /= names[0]
        if has_images(inner, directly=True):
            return folder  # a single class is no wrapper
    return inner if names else folder


def _with_images(folder: Path) -> list[str]:
    return [name for name in folders_in(folder) if has_images(folder / name)]


def _refuse_splits(folder: Path, names: list[str]) -> None:
    """ValueError for splits that are no class folders: several folders of splits (`cropped/train`
    beside `full/train`), or splits of images without classes."""
    for name in names:
        if len(_splits(folder / name, folders_in(folder / name))) == 2:
            raise ValueError(
                f"{folder} holds {', '.join(f'{n}/' for n in names[:3])} and {name}/ has splits in "
                f"it: choose one, such as dataset.root={folder / name}"
            )
    meanings = [_split_word(name) for name in names]
    if len(names) > 1 and all(meaning and not meaning[2] for meaning in meanings):
        raise ValueError(
            f"{folder} holds {names[0]}/ and {names[1]}/ without class folders in them: expected "
            f"{folder / names[0]}/<class>/<image>.jpg; images without classes go into one folder "
            "there"
        )


def _doubt(folder: Path, names: list[str]) -> str:
    """Why the classes may be other folders: a single one holds several folders with images, or none
    has images of its own and each holds several folders, or splits. "" where that is not so."""
    if len(names) > 1 and any(has_images(folder / name, directly=True) for name in names):
        return ""
    inside = {name: _with_images(folder / name) for name in names}
    first = names[0]
    shared = sorted(set.intersection(*map(set, inside.values())))
    if any(map(_split_word, shared)):
        return (
            f"each class holds the folders {', '.join(shared)}, whose images are taken together: "
            f"splits are expected above the classes, {folder}/train/{first}"
        )
    if min(map(len, inside.values())) < 2:
        return ""
    examples = " and ".join(f"{first}/{name}" for name in inside[first][:2])
    return (
        f"the classes are {', '.join(names[:3])}{', ...' * (len(names) > 3)}, which hold folders "
        f"such as {examples}: if those are the classes, put them directly into the folder of the "
        f"split, or use dataset.root={folder / first}"
    )


def _why_none(folder: Path) -> str:
    expected = f"expected {folder}/<class>/<image>.jpg"
    if has_images(folder, directly=True):
        return (
            f"{folder} holds images and no class folders: {expected}; if it is a class itself, "
            f"use dataset.root={folder.parent}"
        )
    if folders := folders_in(folder):
        return f"{folder} holds no images in its {len(folders)} folders: {expected}"
    return f"{folder} holds no class folders: {expected}"


def words(folder: str) -> str:
    """A folder's name with underscores and CamelCase taken apart, spelled as it is otherwise.

    "black_tern", "BlackTern" and "black tern" are the same to CLIP, whose tokenizer ignores case.
    Capitals in a row stay together, up to the one that begins a word: "HTMLPage" is "HTML Page",
    while "USA" and "DVDs" are one word. So are "iPhone" and "McLaren". A number is parted from a
    capitalised word: "RedCircle2" is "Red Circle 2"; "MP4-12C" and "B2" stay. A name with spaces
    is words already: "BMW ActiveHybrid 5" is what its author wrote.
    """
    if " " in folder.strip():
        return folder.replace("_", " ")
    return " ".join(_apart(word) for word in folder.replace("_", " ").split()) or folder


def _apart(word: str) -> str:
    """A word with spaces where another begins within it."""
    starts = [0, *(i for i in range(1, len(word)) if _begins(word[:i], word[i:])), len(word)]
    return " ".join(word[a:b] for a, b in pairwise(starts))


def _begins(before: str, rest: str) -> bool:
    """Whether a new word begins with `rest`."""
    last, first = before[-1], rest[0]
    if first.isupper() and last.islower():
        return len(before) > 1 and not before.endswith("Mc")
    if first.isupper() and last.isalnum():  # a capital or a digit
        return rest[1:3].islower() and len(rest) > 2 and any(map(str.isalpha, before))
    if first.isdigit() and last.islower():
        return len(before) > 2 and before != before.lower()
    return False

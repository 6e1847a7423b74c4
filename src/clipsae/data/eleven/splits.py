"""Which image belongs to which split: CoOp's files, and a rule for sets without a split."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from clipsae.data.eleven.files import images_in, read_json
from clipsae.data.listing import folders_in


@dataclass(frozen=True)
class Split:
    """One split, as its annotations give it.

    Attributes:
        files: N paths relative to the folder of images.
        labels: N class indices.
        raw: C class names as the dataset spells them.
        clean: C names for prompts; None: by the dataset's rule from `raw`.
        source: the file that names the images; None: they were seen in their folders.
    """

    files: Sequence[str]
    labels: Sequence[int]
    raw: Sequence[str]
    clean: Sequence[str] | None = None
    source: Path | None = None


def read_coop_split(path: Path, split: str, raw_name: Callable[[str, str], str]) -> Split:
    """One split of CoOp's `split_zhou_*.json`.

    The file holds lists "train", "val" and "test" of [path, label, class name]; "val" is in
    neither of our splits, as in CoOp.

    Args:
        path: the file.
        split: "train" or "test".
        raw_name: (path of an image, CoOp's class name) -> the dataset's own spelling.

    Raises:
        ValueError: not such a file, a label without a name or with two.
    """
    content = read_json(path)
    names: dict[int, str] = {}
    raw: dict[int, str] = {}
    chosen: list[tuple[str, int]] = []
    for part in ("train", "val", "test"):
        if not isinstance(content, dict) or not isinstance(content.get(part), list):
            raise ValueError(f"{path} has no list {part!r}: expected CoOp's train, val and test")
        for entry in content[part]:
            try:
                file, label, name = entry[0], int(entry[1]), entry[2]
                clean = name.replace("_", " ")
                raw.setdefault(label, raw_name(file, name))
            except (TypeError, ValueError, IndexError, KeyError, AttributeError) as error:
                raise ValueError(
                    f"{path}: {entry!r} is not [image path, label, class name]"
                ) from error
            if names.setdefault(label, clean) != clean:
                raise ValueError(f"{path}: label {label} is both {names[label]!r} and {clean!r}")
            if part == split:
                chosen.append((file, label))
    unnamed = set(range(max(names, default=-1) + 1)) - set(names)
    if not chosen or unnamed or min(names) < 0:
        about = f"no image has label {min(unnamed)}" if unnamed else f"nothing in {split!r}"
        raise ValueError(f"{path}: {about}: expected labels 0, 1, ... and images of each split")
    return Split(
        files=[file for file, _ in chosen],
        labels=[label for _, label in chosen],
        raw=[raw[label] for label in sorted(raw)],
        clean=[names[label] for label in sorted(names)],
        source=path,
    )


def split_by_rule(folder: Path, split: str, left_out: Sequence[str] = ()) -> Split:
    """A split of class folders that come with none: half to train, three tenths to test.

    CoOp's proportions and rounding, so that the sizes are the published ones; which images they
    are is decided by the SHA-256 of "<class>/<file>", the same on every machine. The two tenths
    between, CoOp's validation images, are in neither split.

    Raises:
        ValueError: no class folders.
    """
    inside = {name: images_in(folder / name) for name in folders_in(folder) if name not in left_out}
    classes = [name for name, images in inside.items() if images]
    if not classes:
        raise ValueError(f"{folder} holds no class folders: expected {folder}/<class>/<image>.jpg")
    files: list[str] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        images = [f"{name}/{image}" for image in inside[name]]
        images.sort(key=lambda file: hashlib.sha256(file.encode(errors="surrogateescape")).digest())
        train = round(len(images) * 0.5)
        val = round(len(images) * 0.2)
        chosen = sorted(images[:train] if split == "train" else images[train + val :])
        files += chosen
        labels += [label] * len(chosen)
    return Split(files, labels, classes)

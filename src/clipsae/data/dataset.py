"""What a dataset of images is, and the one that is a list of files."""

import hashlib
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor
from torch.utils.data import Dataset

from clipsae.data.images import read_image

Template = Callable[[str], str] | str
OnBadImage = Literal["error", "skip"]
# How much is read for a fingerprint: a second or two.
CONTENT_FILES = 10_000
CONTENT_BYTES = 256 << 20


def check_choice(option: str, value: str, *choices: str) -> None:
    """ValueError where an option has none of its choices."""
    if value not in choices:
        raise ValueError(f"{option}={value!r}: expected {' or '.join(choices)}")


class ImageDataset(Protocol):
    """One split of a dataset. Classes are keyed by index: names may repeat.

    SAEs of both towers (`clip.hook=towers`) also need `captions(indices) -> list[str]`, a caption
    of each of these images.

    Attributes:
        classnames: C names.
        templates: prompts, or None for the 80 of OpenAI's ImageNet ensemble.
        labels: LongTensor [N], known without decoding an image.
        image_size: S.
        fingerprint: a hash of what the images are, wherever they lie.
    """

    classnames: Sequence[str]
    templates: Sequence[Template] | None
    labels: Tensor
    image_size: int

    @property
    def fingerprint(self) -> str: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """uint8 [3, S, S] and the label."""
        ...


class ImageList(Dataset):
    """A dataset that is a list of image files with labels.

    Args:
        root: the folder that `files` are relative to.
        files: N relative paths.
        labels: N class indices.
        classnames: C names.
        templates: prompts, or None for the default ones.
        image_size: S.
        on_bad_image: what the loaders do with a file that cannot be read: "error" stops and names
            it; "skip" counts and reports it, and goes on.
        as_seen: see `read_image`; False for published datasets.

    Attributes:
        prompt: what a class's name is put in for `captions`.

    Raises:
        ValueError: no files, labels beyond the class names, an unknown `on_bad_image`.
    """

    prompt = "a photo of a {}."

    def __init__(
        self,
        root: Path | str,
        files: Sequence[str],
        labels: Sequence[int],
        classnames: Sequence[str],
        *,
        templates: Sequence[Template] | None = None,
        image_size: int = 224,
        on_bad_image: OnBadImage = "error",
        as_seen: bool = True,
    ) -> None:
        check_choice("on_bad_image", on_bad_image, "error", "skip")
        if not len(files):
            raise ValueError(f"{root} holds no images: expected at least one")
        if len(files) != len(labels):
            raise ValueError(f"{len(files)} files with {len(labels)} labels: expected as many")
        if max(labels) >= len(classnames) or min(labels) < 0:
            raise ValueError(
                f"labels from {min(labels)} to {max(labels)} with {len(classnames)} class names"
            )
        self.root = Path(root)
        self.files = list(files)
        self.labels = torch.tensor(labels, dtype=torch.long)
        self.classnames = list(classnames)
        self.templates = templates
        self.image_size = image_size
        self.on_bad_image = on_bad_image
        self.as_seen = as_seen

    @cached_property  # every stage of a run asks for it
    def fingerprint(self) -> str:
        """Hash of the class names, the relative paths with their labels, and what the files hold.

        Of up to `CONTENT_FILES` files with `CONTENT_BYTES` together that is their contents, so
        that a copy elsewhere has the same fingerprint. Of more it is the size and the time of the
        last change of each: copy such images with `rsync -a` or `cp -a`, which keep them.
        """
        hashed = hashlib.sha256()
        for name in self.classnames:
            hashed.update(f"{name}\0".encode())
        for file, label in zip(self.files, self.labels.tolist(), strict=True):
            hashed.update(f"{file}\0{label}\0".encode(errors="surrogateescape"))
        for found in self._of_files(_sha256) if self.is_small else self._stats:
            hashed.update(f"{found}\0".encode())
        return hashed.hexdigest()[:16]

    @property
    def is_small(self) -> bool:
        """Whether there are no more than `CONTENT_FILES` files and `CONTENT_BYTES`."""
        few = len(self.files) <= CONTENT_FILES
        return few and sum(size for size, _ in self._stats) <= CONTENT_BYTES

    @cached_property
    def _stats(self) -> list[tuple[int, int]]:
        return self._of_files(_size_and_time)

    def _of_files(self, look: Callable[[str], Any]) -> list[Any]:
        """`look` at each file; several at a time, since a network's disk takes long to answer."""
        parts = [self.files[i : i + 500] for i in range(0, len(self.files), 500)]
        with ThreadPoolExecutor(16) as pool:
            found = pool.map(lambda part: [look(f"{self.root}/{file}") for file in part], parts)
            return [one for part in found for one in part]

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """uint8 [3, S, S] and the label.

        Raises:
            BadImageError: the file cannot be read.
        """
        image = read_image(self.root / self.files[index], self.image_size, as_seen=self.as_seen)
        return image, int(self.labels[index])

    def captions(self, indices: Sequence[int] | Tensor) -> list[str]:
        """A caption of each image: the name of its class in `prompt`."""
        labels = self.labels[torch.as_tensor(indices, dtype=torch.long)].tolist()
        return [self.prompt.format(self.classnames[label]) for label in labels]


def _size_and_time(path: str) -> tuple[int, int]:
    try:
        stat = os.stat(path)  # noqa: PTH116 - a Path would take three times as long
    except OSError:
        return -1, 0  # a reader will say what is wrong with it
    return stat.st_size, stat.st_mtime_ns


def _sha256(path: str) -> str:
    try:
        with open(path, "rb") as file:  # noqa: PTH123
            return hashlib.sha256(file.read()).hexdigest()
    except OSError:
        return ""

"""Images for the measurements: of a folder, or random pixels."""

from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset

from clipsae.data.dataset import ImageList
from clipsae.data.listing import list_images


class Noise(Dataset):
    """n images of random pixels, S x S, with labels."""

    templates = None

    def __init__(self, labels: list[int], image_size: int) -> None:
        self.labels = torch.tensor(labels)
        self.classnames = [f"class {label}" for label in range(max(labels) + 1)]
        self.image_size = image_size
        self.fingerprint = f"noise-{len(labels)}-{image_size}"

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        generator = torch.Generator().manual_seed(index)
        shape = (3, self.image_size, self.image_size)
        pixels = torch.randint(256, shape, dtype=torch.uint8, generator=generator)
        return pixels, int(self.labels[index])


def images(folder: Path | None, n: int, image_size: int, classes: int = 4) -> Noise | ImageList:
    """The first n images below a folder, in as many groups as there are to be classes.

    Raises:
        ValueError: fewer images in the folder.
    """
    labels = [i * classes // n for i in range(n)]
    if folder is None:
        return Noise(labels, image_size)
    files = list_images(folder)[:n]
    if len(files) < n:
        raise ValueError(f"--images {folder}: {len(files)} images, expected at least {n}")
    names = [f"class {label}" for label in range(classes)]
    return ImageList(folder, files, labels, names, image_size=image_size)

"""Captions of images: read from a file, and tokenised for SAEs of both towers.

B images of a batch, N images of a dataset.
"""

import csv
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clipsae.clip import FrozenCLIP
from clipsae.errors import ConfigError

COLUMNS = ("file", "caption")
_COMPARED = 64  # evenly spaced

Texts = Callable[[Tensor], Tensor]
"""Indices of images, LongTensor [B] -> their tokenised captions [B, context]."""


def texts_of(clip: FrozenCLIP, dataset: Any) -> Texts | None:
    """What gives the captions of a dataset's images to a CLIP whose SAEs are of both towers; None
    for any other.

    Raises:
        ConfigError: a dataset without captions.
    """
    if not clip.has_captions:
        return None
    if not hasattr(dataset, "captions"):
        raise ConfigError(
            f"clip.hook=towers: {type(dataset).__name__} has no captions: give it a method "
            "captions(indices), or use clip.hook=embedding"
        )
    return lambda indices: clip.tokenizer(dataset.captions(indices))


def captions_differ(dataset: Any) -> bool:
    """Whether a dataset's images have captions, and not all the same: by `_COMPARED` of them."""
    if not hasattr(dataset, "captions"):
        return False
    some = torch.linspace(0, len(dataset) - 1, _COMPARED).long()
    return len(set(dataset.captions(some))) > 1


def with_texts(images: Tensor, indices: Tensor, texts: Texts | None) -> Any:
    """Images uint8 [B, 3, S, S], or {"images", "texts"} where there are captions."""
    return images if texts is None else {"images": images, "texts": texts(indices)}


def read_captions(path: Path | str, root: Path, files: Sequence[str]) -> list[str]:
    """The caption of each file, by a CSV file with the columns `file` and `caption`.

    Args:
        path: the CSV file, UTF-8. Of several captions of an image the first is taken; rows of other
            files are left out.
        root: the folder that its paths are relative to.
        files: N relative paths.

    Raises:
        FileNotFoundError: no such file.
        ValueError: other columns, no UTF-8, or images without a caption.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"dataset.captions={path}: there is no such file")
    found: dict[str, str] = {}
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = csv.DictReader(file)
            if not set(COLUMNS) <= set(rows.fieldnames or ()):
                raise ValueError(
                    f"dataset.captions={path} has the columns {', '.join(rows.fieldnames or ())}: "
                    f"expected {' and '.join(COLUMNS)}, in its first line"
                )
            for row in rows:
                if row["file"] and (row["caption"] or "").strip():
                    found.setdefault(Path(row["file"]).as_posix(), row["caption"].strip())
    except UnicodeDecodeError as error:
        raise ValueError(f"dataset.captions={path} is no UTF-8 text: save it as such") from error
    if missing := [file for file in files if file not in found]:
        raise ValueError(
            f"dataset.captions={path} has no caption of {len(missing):,} of {len(files):,} images, "
            f"such as {missing[0]}: expected a row for each, with its path relative to {root}"
        )
    return [found[file] for file in files]

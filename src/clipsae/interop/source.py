"""Where an SAE comes from: a folder or a file of any known format, or a Hugging Face id."""

import logging
from pathlib import Path

from clipsae.interop import (
    checkpoint,
    dictionary_learning,
    hub,
    native,
    saelens,
    visaebench,
)
from clipsae.interop.plain import Imported
from clipsae.sae import SAE

log = logging.getLogger(__name__)

FORMATS = (native, saelens, dictionary_learning, visaebench)
FILES = tuple(dict.fromkeys(name for one in FORMATS for name in one.FILES))


def load(source: str | Path) -> SAE:
    """An SAE in eval mode, on the CPU; what could not be carried over is logged, a line each.

    Args:
        source: a folder with `sae.json` and `sae.safetensors` (one of a store, or saved by
            `SAE.save`); a folder of SAELens, sparsify, dictionary_learning or visaebench; a `.pt`
            file of PatchSAE, early SAELens, ViT-Prisma or the Sparsemax SAE's authors; a Hugging
            Face id of one of these, "owner/name", "owner/name/folder" or "owner/name/file.pt",
            with "@revision" if wanted; or "saelens:RELEASE/SAE_ID".

    Raises:
        FileNotFoundError: nothing there.
        ValueError: a format or an option that is not known, or files that are damaged or hostile.
    """
    found = read(source)
    for sentence in found.lost:
        log.warning("%s", sentence)
    return found.sae


def read(source: str | Path) -> Imported:
    """As `load`, with the format, what it says of its tokens, and what could not be carried over.

    Raises:
        FileNotFoundError, ValueError: as `load`.
    """
    text = str(source)
    if text.startswith("saelens:"):
        release, _, sae_id = text.removeprefix("saelens:").partition("/")
        return saelens.from_library(release, sae_id)
    path = Path(source).expanduser()
    if not path.exists():
        path = hub.fetch(text, FILES, checkpoint.SUFFIXES)
    return _read(path)


def _read(path: Path) -> Imported:
    file = path if path.is_file() and path.suffix in checkpoint.SUFFIXES else None
    if file is None and path.is_file() and path.name not in FILES:
        raise ValueError(
            f"{path} is of no known format: expected a folder with one of {_marks()}, or a "
            f"{', '.join(checkpoint.SUFFIXES)} file, as torch.save writes it"
        )
    folder = path.parent if path.is_file() else path
    if file is None or file.name in FILES:
        for one in FORMATS:
            if any((folder / name).is_file() for name in one.MARKS):
                return one.read(folder)
    files = [p for suffix in checkpoint.SUFFIXES for p in sorted(folder.glob(f"*{suffix}"))]
    if file is None and len(files) > 1:
        raise ValueError(f"{path} holds {len(files)} checkpoints: name one, such as {files[0]}")
    if file is None and not files:
        raise FileNotFoundError(f"{path} holds no SAE: expected one of {_marks()}, or a .pt file")
    return checkpoint.read(file or files[0])


def _marks() -> str:
    return ", ".join(dict.fromkeys(name for one in FORMATS for name in one.MARKS))

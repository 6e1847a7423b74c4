"""Where an SAE comes from: a folder or a file of any known format, or a Hugging Face id."""

import logging
from collections.abc import Callable
from pathlib import Path

from clipsae.interop import (
    batchtopk,
    checkpoint,
    dictionary_learning,
    hub,
    saelens,
    sparsify,
    visaebench,
)
from clipsae.interop.files import Config, check_finite, read_config, read_weights
from clipsae.interop.plain import Imported
from clipsae.sae import SAE

log = logging.getLogger(__name__)


def load(source: str | Path) -> SAE:
    """An SAE in eval mode, on the CPU; what could not be carried over is logged, a line each.

    Args:
        source: a folder with `sae.json` and `sae.safetensors` (one of a store, or saved by
            `SAE.save`); a folder of SAELens, sparsify, dictionary_learning, ViT-Prisma, BatchTopK
            or visaebench; a `.pt` file of PatchSAE, early SAELens, ViT-Prisma, BatchTopK, saev,
            overcomplete, MSAE, clipscope or the Sparsemax SAE's authors; a Hugging Face id of one
            of these, "owner/name", "owner/name/folder" or "owner/name/file.pt", with "@revision" if
            wanted; or "saelens:RELEASE/SAE_ID".

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
            f"{path} has no known format: expected a folder with one of {', '.join(FORMATS)}, or "
            f"a {', '.join(checkpoint.SUFFIXES)} file, as torch.save writes it"
        )
    folder = path.parent if path.is_file() else path
    if file is None or file.name in FILES:
        for name, read_folder in FORMATS.items():
            if (folder / name).is_file():
                return read_folder(folder)
    files = [p for suffix in checkpoint.SUFFIXES for p in sorted(folder.glob(f"*{suffix}"))]
    if file is None and len(files) > 1:
        raise ValueError(f"{path} holds {len(files)} checkpoints: name one, such as {files[0]}")
    if file is None and not files:
        raise FileNotFoundError(
            f"{path} holds no SAE: expected one of {', '.join(FORMATS)}, or a .pt file"
            f"{_inside(path)}"
        )
    return checkpoint.read(file or files[0])


_OF_CLIP = ("name", "pretrained", "layer", "hook")


def _native(folder: Path) -> Imported:
    """What `SAE.save` writes, checked more strictly than in `SAE.load`: it may be untrusted."""
    about, weights = folder / "sae.json", folder / "sae.safetensors"
    config = Config(read_config(about), about)
    config.known("format", "version")
    if not isinstance(config.get("config"), dict):
        raise ValueError(f"{about} has no config: expected format, version and config")
    config.refuse_others()
    read_weights(weights)
    try:
        sae = SAE.load(folder)
    except ValueError as error:
        said = str(error)
        raise ValueError(said if str(folder) in said else f"{about}: {said}") from error
    except (TypeError, RuntimeError, OverflowError) as error:
        raise ValueError(f"{about}: an invalid config: {error}") from error
    for name, tensor in sae.state_dict().items():
        if tensor.is_floating_point():
            check_finite(tensor, name, weights)
    # A store keeps the config of its training beside it.
    stored = folder / "config.yaml"
    clip = read_config(stored).get("clip") if stored.is_file() else None
    clip = clip if isinstance(clip, dict) else {}
    return Imported(sae, "clipsae", {f"clip.{key}": clip[key] for key in _OF_CLIP if key in clip})


def _named_config(folder: Path) -> Imported:
    """`config.json` is a name that several libraries give: its words tell whose it is."""
    about = folder / "config.json"
    cfg = read_config(about)
    if batchtopk.holds(cfg):
        return batchtopk.read(folder)
    if checkpoint.is_prisma(cfg):
        return checkpoint.read_prisma(folder)
    if "hookpoints" in cfg:
        raise ValueError(f"{about} is that of a training of sparsify{_inside(folder)}")
    return visaebench.read(folder)


def _inside(folder: Path) -> str:
    """A hint at SAEs in a folder's folders, as a training of several layers writes them."""
    found = sorted({p.parent for name in FORMATS for p in folder.glob(f"*/{name}")})
    return f": name one of the {len(found)} SAEs in it, such as {found[0]}" if found else ""


# Readers of folders, by the file that tells the format; what is fetched of a repository.
FORMATS: dict[str, Callable[[Path], Imported]] = {
    "sae.json": _native,
    "cfg.json": saelens.read,
    "ae.pt": dictionary_learning.read,
    **dict.fromkeys(visaebench.CONFIGS, visaebench.read),
    "config.json": _named_config,
}
FILES = (*FORMATS, sparsify.WEIGHTS, saelens.WEIGHTS, checkpoint.WEIGHTS, *visaebench.WEIGHTS)

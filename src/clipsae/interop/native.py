"""Our own folders: `sae.safetensors` and `sae.json`, as `SAE.save` writes them."""

from pathlib import Path

from clipsae.interop.plain import Imported
from clipsae.interop.safely import all_finite, read_config, read_safetensors
from clipsae.sae import SAE

NAME = "clipsae"
FILES = ("sae.json", "sae.safetensors")
MARKS = ("sae.json",)

_KEYS = {"format", "version", "config"}


def read(folder: Path) -> Imported:
    """Read a folder, looking more closely than `SAE.load` does at files that may be a stranger's.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a key that does not exist, shapes that do not fit, NaN, a newer version.
    """
    about = read_config(folder / "sae.json")
    unknown = sorted(set(about) - _KEYS)
    if unknown or not isinstance(about.get("config"), dict):
        what = f"has the unknown key {unknown[0]!r}" if unknown else "has no config"
        raise ValueError(f"{folder}/sae.json {what}: expected {', '.join(sorted(_KEYS))}")
    read_safetensors(folder / "sae.safetensors")
    try:
        sae = SAE.load(folder)
    except ValueError as error:
        said = str(error)
        raise ValueError(said if str(folder) in said else f"{folder}/sae.json: {said}") from error
    except (TypeError, RuntimeError, OverflowError) as error:
        raise ValueError(f"{folder}/sae.json: a config that makes no SAE: {error}") from error
    for name, tensor in sae.state_dict().items():
        if tensor.is_floating_point():
            all_finite(tensor, name, folder / "sae.safetensors")
    return Imported(sae, NAME)

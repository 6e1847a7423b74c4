"""Opens in Python what `task=name` or `task=explore` has made."""

from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from clipsae.errors import ConfigError
from clipsae.naming import Names
from clipsae.sae import SAE
from clipsae.store.files import MARK, read_json
from clipsae.tasks import build, precision
from clipsae.visualization import References
from clipsae.visualization.latents import Dictionary


def load_dictionary(folder: Path | str) -> Dictionary:
    """A dictionary with its names and reference images, on the best device there is.

    Args:
        folder: of the names in the store, `outputs/names/...`, as `task=name` prints it.

    Raises:
        ConfigError: no names there, or something that they were made of is gone.
    """
    folder = Path(folder).expanduser()
    key = read_json(folder / MARK).get("key", {})
    if "pictures" not in key:
        raise ConfigError(
            f"{folder} holds no names of latents: give a folder of outputs/names, which task=name "
            "writes"
        )
    store = folder.resolve().parent.parent
    cfg = OmegaConf.load(folder / "config.yaml")
    assert isinstance(cfg, DictConfig)
    pictures = store / "pictures" / key["pictures"]
    references = build.user_error(References.load, pictures)
    sae = build.user_error(SAE.load, store / "sae" / key["sae"])
    clip = build.build_clip(cfg)
    dataset = build.build_dataset(cfg.dataset, references.source.split, clip.image_size)
    precision.apply(cfg, clip)
    names = Names.load(folder)
    return Dictionary(clip.to(build.best_device()), sae, names, references, dataset)

"""`model.k=auto`, `model.target_l0=auto`: as many active latents as a Sparsemax SAE found
worthwhile.

The paper's "data-driven sparsity guidance": the mean support of a trained Sparsemax SAE is the k
of TopK and BatchTopK, and the L0 that JumpReLU's penalty aims at.
"""

import json
import logging
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from clipsae.errors import ConfigError
from clipsae.store import MARK, Store

log = logging.getLogger(__name__)


KEYS = ("k", "target_l0")


def unresolved(cfg: DictConfig) -> list[str]:
    """Those of `KEYS` that are "auto" in `cfg.model`."""
    return [key for key in KEYS if cfg.model.get(key) == "auto"]


def resolve(cfg: DictConfig, store: Store) -> None:
    """Replace `auto` by a number, a whole one, in place; other values are left alone.

    There is no number to fall back on: the same command would then train one SAE before the
    Sparsemax SAE is there and another one afterwards.

    Raises:
        ConfigError: no finished Sparsemax SAE to learn it from.
    """
    keys = unresolved(cfg)
    if not keys:
        return
    found = [folder for folder in store.finished("sae") if _serves(folder, cfg)]
    if not found:
        raise ConfigError(
            f"model.{keys[0]}=auto: no finished Sparsemax SAE of {cfg.model.latents} latents on "
            f"{cfg.clip.name} and {cfg.train_dataset.name} (seed {cfg.seed}) in "
            f"{store.root}: run the same command with model=sparsemax first, or give {keys[0]} a "
            "number"
        )
    newest = max(found, key=lambda folder: json.loads((folder / MARK).read_text())["finished"])
    support = max(1, round(_mean_support(newest)))
    for key in keys:
        cfg.model[key] = support
        log.info("model.%s=auto is %d, the mean support of %s", key, support, newest)


def _serves(folder: Path, cfg: DictConfig) -> bool:
    """Whether a finished SAE is a Sparsemax SAE on the same CLIP, images, size and seed."""
    of = OmegaConf.load(folder / "config.yaml")
    same = ("clip.name", "clip.pretrained", "clip.layer", "model.latents", "seed")
    return (
        of.model.name == "sparsemax"
        and of.clip.get("hook", "resid") == cfg.clip.get("hook", "resid")
        and all(OmegaConf.select(of, key) == OmegaConf.select(cfg, key) for key in same)
        and (of.train_dataset.get("name") or of.dataset.name) == cfg.train_dataset.name
        and _mean_support(folder) is not None
    )


def _mean_support(folder: Path) -> float | None:
    """Mean number of active latents of a held-out token at the end of the training."""
    numbers = json.loads((folder / "training.json").read_text())
    return numbers.get("val/l0", numbers.get("val/active"))  # as clipsae 0.1 called it

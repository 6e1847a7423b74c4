"""`model.k=auto`: as many active latents as a Sparsemax SAE found worthwhile.

The paper's "data-driven sparsity guidance": the mean support of a trained Sparsemax SAE is the k
of TopK and BatchTopK.
"""

import json
import logging
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from clipsae.errors import ConfigError
from clipsae.store import MARK, Store

log = logging.getLogger(__name__)


def resolve_k(cfg: DictConfig, store: Store) -> None:
    """Replace `model.k=auto` by a number, in place; any other k is left alone.

    Raises:
        ConfigError: no finished Sparsemax SAE to learn it from.
    """
    if cfg.model.get("k") != "auto":
        return
    found = [folder for folder in store.finished("sae") if _serves(folder, cfg)]
    if not found:
        raise ConfigError(
            f"model.k=auto: no finished Sparsemax SAE of {cfg.model.latents} latents on "
            f"{cfg.clip.name} and {cfg.train_dataset.name} (seed {cfg.seed}) in "
            f"{store.root}: run the same command with model=sparsemax first, or give k a number"
        )
    newest = max(found, key=lambda folder: json.loads((folder / MARK).read_text())["finished"])
    cfg.model.k = max(1, round(_mean_support(newest)))
    log.info("model.k=auto is %d, the mean support of %s", cfg.model.k, newest)


def _serves(folder: Path, cfg: DictConfig) -> bool:
    """Whether a finished SAE is a Sparsemax SAE on the same CLIP, images, size and seed."""
    of = OmegaConf.load(folder / "config.yaml")
    same = ("clip.name", "clip.pretrained", "clip.layer", "model.latents", "seed")
    return (
        of.model.name == "sparsemax"
        and all(OmegaConf.select(of, key) == OmegaConf.select(cfg, key) for key in same)
        and (of.train_dataset.get("name") or of.dataset.name) == cfg.train_dataset.name
        and _mean_support(folder) is not None
    )


def _mean_support(folder: Path) -> float | None:
    """Mean number of active latents of a held-out token at the end of the training."""
    numbers = json.loads((folder / "training.json").read_text())
    return numbers.get("val/l0", numbers.get("val/active"))  # as clipsae 0.1 called it

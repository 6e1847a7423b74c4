"""`task=export`: a finished SAE as another library reads it, or published with its card."""

import logging
from pathlib import Path

from omegaconf import DictConfig

from clipsae.errors import ConfigError
from clipsae.interop import hub, read, saelens, visaebench
from clipsae.rules import EMBEDDINGS
from clipsae.sae import SAE
from clipsae.store import Store
from clipsae.tasks import build, guidance, precision
from clipsae.tasks.stages import sae as training

log = logging.getLogger(__name__)

TARGETS = ("clipsae", "saelens", "visaebench")


def run(cfg: DictConfig) -> None:
    """Write the folder, say what could not be carried over, publish it if asked to.

    Raises:
        ConfigError: a target that does not exist, an SAE that is not there or not finished, or
            one that the target cannot hold; a Hub that cannot be reached.
    """
    task = cfg.task
    if task.to not in TARGETS:
        raise ConfigError(f"task.to={task.to!r}: expected one of {', '.join(TARGETS)}")
    if task.push is not None and not hub.is_id(task.push):
        raise ConfigError(f"task.push={task.push!r}: expected owner/name")
    source = _trained_here(cfg) if task.sae is None else str(task.sae)
    sae = build.user_error(read, source).sae
    name = Path(source).name
    folder = Path(task.folder or Path(cfg.paths.output_dir) / "export" / task.to / name)
    for sentence in build.user_error(_write, sae, source, cfg, folder):
        log.warning("%s", sentence)
    log.info("written for %s: %s", task.to, folder)
    if task.push is not None:
        address = build.user_error(
            hub.upload,
            folder,
            task.push,
            private=task.private,
            message=f"Upload an SAE, written for {task.to}",
        )
        log.info("published: %s", address)


def _trained_here(cfg: DictConfig) -> str:
    """The finished SAE of the composed config."""
    store = Store(cfg.paths.output_dir)
    guidance.resolve(cfg, store)
    clip = build.build_clip(cfg)
    train_set = build.build_dataset(cfg.train_dataset, "train", clip.image_size)
    stage = precision.resolve(cfg, lambda: training.stage(cfg, store, train_set))
    if not stage.finished:
        raise ConfigError(
            f"{stage.path} is not finished: run the same command without task=export first, or "
            "name another SAE with task.sae="
        )
    return str(stage.path)


def _write(sae: SAE, source: str, cfg: DictConfig, folder: Path) -> list[str]:
    """Write it; what could not be carried over."""
    if cfg.task.to == "visaebench":
        return visaebench.write(sae, folder)
    if cfg.task.to == "clipsae":
        there = Path(source).is_dir() and (Path(source) / "sae.json").is_file()
        hub.save_with_card(source if there else sae, folder, cfg.task.push or str(folder))
        return []
    about = {}
    if cfg.task.sae is None:
        block = f"visual.transformer.resblocks[{cfg.clip.layer}]"
        hook = cfg.clip.get("hook", "resid")
        places = {"resid": block, **dict.fromkeys(EMBEDDINGS, "visual")}
        about = {
            "model_name": cfg.clip.name,
            "hook_name": places.get(hook, f"{block}.hook_{hook}"),
        }
    return saelens.write(sae, folder, about)

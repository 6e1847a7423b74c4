"""`task=evaluate`: the benchmark on an SAE that was not trained here.

It is imported into the store once, under a key made of its weights, its config and the CLIP; what
follows are the same evaluation and measurement as of an SAE that was.
"""

import hashlib
import json
import logging
import re
from collections.abc import Callable
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from clipsae.clip import FrozenCLIP
from clipsae.errors import ConfigError
from clipsae.interop import Imported, read
from clipsae.rules import EMBEDDINGS, is_whole, where
from clipsae.sae import SAE
from clipsae.store import Stage, Store, write_json
from clipsae.tasks import build, precision
from clipsae.tasks.experiment import Experiment, check, finish
from clipsae.tasks.stages.sae import check_target

log = logging.getLogger(__name__)

COUNT_THRESHOLD = 0.2  # of other tasks with task.sae, as conf/task/evaluate.yaml has it


def run(cfg: DictConfig) -> None:
    """Import, evaluate, measure, show. What is finished is used.

    Raises:
        ConfigError: no SAE there, one that cannot be read or that does not fit the CLIP, or
            anything else invalid in the config; before anything slow has begun.
    """
    finish(prepare(cfg))


def prepare(cfg: DictConfig) -> Experiment:
    """What a config asks for, with the SAE in the store.

    Raises:
        ConfigError: see `run`.
    """
    if not cfg.task.sae:
        raise ConfigError(
            "task.sae is empty: give a folder, a .pt file or a Hugging Face id, such as "
            "task.sae=owner/name"
        )
    check(cfg)
    store = Store(cfg.paths.output_dir)
    cfg, clip, imported, make = bring_in(cfg, store)
    test_set = build.build_dataset(cfg.dataset, cfg.evaluation.split, clip.image_size)
    experiment = Experiment(cfg, store, clip, test_set, imported)
    imported.make(make)
    return experiment


def bring_in(
    cfg: DictConfig, store: Store
) -> tuple[DictConfig, FrozenCLIP, Stage, Callable[[Path], None]]:
    """The SAE of `task.sae`: the config with it as its model, the CLIP, its place in the store, and
    what makes it there.

    Raises:
        ConfigError: no SAE there, one that cannot be read or that does not fit the CLIP.
    """
    found = build.user_error(read, str(cfg.task.sae))
    cfg = as_if_composed(cfg, found)
    clip = build.build_clip(cfg)
    if found.sae.d != clip.width:
        raise ConfigError(
            f"{cfg.task.sae} is for tokens of width {found.sae.d}, and those of {clip.name} have "
            f"{clip.width}: choose the clip=, clip.layer= and clip.hook= that it was trained on"
        )
    check_target(cfg, clip)
    mean = found.sae.normalization.mean
    positions = len(range(clip.positions)[clip.token_slice(found.sae.config["tokens"])])
    if mean is not None and mean.ndim == 2 and len(mean) != positions:
        raise ConfigError(
            f"{cfg.task.sae} has position_mean=true with the means of {len(mean)} positions, and "
            f"{clip.name} has {positions} of its tokens: choose the clip= that it was trained on"
        )
    said = ", ".join(f"{name}={value}" for name, value in found.reads.items())
    log.info(
        "an SAE of %s, trained on tokens of %s; it reads those of %s (%s), %s",
        *(found.format, said or "a model that its file does not name"),
        *(
            clip.name,
            Path(cfg.clip.pretrained or "random weights").name,
            where(cfg.clip.layer, cfg.clip.get("hook", "resid")),
        ),
    )
    for sentence in (*found.lost, *elsewhere(cfg, clip, found)):
        log.warning("%s", sentence)
    weights = digest(found.sae)

    def place() -> Stage:
        return store.stage(
            "sae",
            [cfg.model.name, clip.name, "imported", f"m{found.sae.latents}"],
            {"imported": weights, "clip": build.clip_key(cfg)},
            {**build.cell(cfg), "dataset": cfg.train_dataset.name},
        )

    stage = precision.resolve(cfg, place)
    return cfg, clip, stage, lambda folder: save(cfg, found, folder)


def elsewhere(cfg: DictConfig, clip: FrozenCLIP, found: Imported) -> list[str]:
    """That an SAE of ours reads other tokens than those that it was trained on, in a sentence."""
    name, layer, hook = (found.reads.get(f"clip.{key}") for key in ("name", "layer", "hook"))
    if name != clip.name or not is_whole(layer):
        return []
    hook, own = hook or "resid", cfg.clip.get("hook", "resid")
    same_layer = hook in EMBEDDINGS or layer % clip.blocks == clip.layer % clip.blocks
    if hook == own and same_layer:
        return []
    return [
        f"{cfg.task.sae} was trained on the tokens of clip.layer={layer} clip.hook={hook}: what "
        "follows is of others, unless these are added to the command"
    ]


def as_if_composed(cfg: DictConfig, found: Imported) -> DictConfig:
    """The config with the imported SAE as its model, and without where it lay on this machine."""
    options = build.plain(cfg)
    source = str(options["task"]["sae"])
    last = re.split(r"[/\\]", source.rstrip("/\\"))[-1]
    if Path(source).exists():
        options["task"]["sae"] = Path(source).resolve().name
        last = re.sub(r"\.(pt|pth|ckpt)$", "", options["task"]["sae"])
    options["model"] = {
        "name": options["task"].get("name") or last,
        "latents": found.sae.latents,
        "k": found.sae.config.get("k"),
        "target_layer": found.sae.config["target_layer"],
        "imported": {"from": found.format, "reads": found.reads, "config": found.sae.config},
    }
    threshold = options["task"].get("count_threshold", COUNT_THRESHOLD)
    options["evaluation"]["count_threshold"] = threshold
    options["train_dataset"] = {"name": "elsewhere"}
    options["features"] |= {name: found.sae.config[name] for name in build.TOKEN_KEYS}
    del options["optimizer"]
    options["seed"] = 0  # of a training that was not ours
    return OmegaConf.create(options, flags={"struct": True})


def save(cfg: DictConfig, found: Imported, folder: Path) -> None:
    """Write an imported SAE as a trained one lies in the store."""
    found.sae.save(folder)
    write_json(
        folder / "training.json",
        {"imported": found.format, "reads": found.reads, "lost": list(found.lost)},
    )
    build.save_config(cfg, folder)


def digest(sae: SAE) -> str:
    """SHA-256 of an SAE's config and weights; the file format does not matter."""
    hashed = hashlib.sha256(json.dumps(sae.config, sort_keys=True).encode())
    for name, tensor in sorted(sae.state_dict().items()):
        hashed.update(f"\0{name} {tensor.dtype} {list(tensor.shape)}\0".encode())
        hashed.update(tensor.detach().cpu().contiguous().reshape(-1).numpy())
    return hashed.hexdigest()

"""From a config to objects: the one place where `_target_` is followed."""

import json
import os
from functools import cache
from inspect import signature
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import torch
from hydra.utils import get_object
from omegaconf import DictConfig, OmegaConf

from clipsae.clip import FrozenCLIP
from clipsae.data import ImageDataset
from clipsae.data.reader import leaves_out
from clipsae.errors import ConfigError
from clipsae.rules import EMBEDDINGS
from clipsae.sae import SAE
from clipsae.store.files import sha256
from clipsae.tasks import precision
from clipsae.tasks.options import unknown_key

IMAGES_WITH_RANDOM_WEIGHTS = 64
_clips: WeakValueDictionary[str, FrozenCLIP] = WeakValueDictionary()
_models: WeakValueDictionary[str, FrozenCLIP] = WeakValueDictionary()  # whatever the layer
_datasets: WeakValueDictionary[str, ImageDataset] = WeakValueDictionary()
# Of conf/model, and not the SAE's.
TRAINING_KEYS = ("initial_images", "statistics_images", "compile")
TOKEN_KEYS = ("tokens", "max_norm_ratio")  # of conf/features, and the SAE's, too
DATASET = ("labels", "classnames", "templates", "fingerprint")  # attributes of every dataset
PLACE_KEYS = ("root", "download", "num_workers", "pin_memory")  # where and how fast images are read
# What identifies a result is everything in its groups of the config, options of tomorrow, too, but
# what is listed here: where things lie, how fast they are read, what is observed meanwhile.
UNDECISIVE: dict[str, tuple[str, ...]] = {
    "dataset": (*PLACE_KEYS, "on_bad_image", "captions"),  # what they say is in the fingerprint
    "model": ("name", "fit", *TRAINING_KEYS),  # fit: stages/sae.py's key has it where it is set
    "features": ("num_workers", "pin_memory", "image_cache", "folder", "shard_gb"),
    "evaluation": ("batch_size",),
    "trainer": (
        *("accelerator", "strategy", "log_every_n_steps", "profiler", "max_time"),
        *("val_check_interval", "limit_val_batches", "num_sanity_val_steps", "inference_mode"),
        *("limit_test_batches", "limit_predict_batches", "detect_anomaly"),
        *("devices", "num_nodes", "accumulate_grad_batches"),  # their product is in the key
    ),
}


def plain(node: DictConfig) -> dict[str, Any]:
    """A resolved copy of plain Python values."""
    return OmegaConf.to_container(node, resolve=True, throw_on_missing=True)


def call_target(node: DictConfig | dict[str, Any], **more: Any) -> Any:
    """Call what `_target_` names with the node's other keys and `more`.

    Unlike Hydra's `instantiate` it leaves nested nodes and the values of `more` as they are.
    """
    options = plain(node) if isinstance(node, DictConfig) else dict(node)
    return get_object(options.pop("_target_"))(**options, **more)


def check_keys(cfg: DictConfig) -> None:
    """Refuse keys of the datasets that their classes do not have.

    Raises:
        ConfigError: the first of them, or a class that cannot be imported.
    """
    for group in ("dataset", "train_dataset"):
        node = plain(cfg[group])
        try:
            known = signature(get_object(node["_target_"])).parameters
        except (ImportError, AttributeError, ValueError) as error:
            said = str(error.__cause__ or error)
            if isinstance(error.__cause__, ModuleNotFoundError):
                said += "; a module of your own is found if its folder is in PYTHONPATH"
            raise ConfigError(f"{group}._target_={node['_target_']}: {said}") from error
        if any(one.kind is one.VAR_KEYWORD for one in known.values()):
            continue
        ours = {"split", "image_size"}
        for key, value in node.items():
            if key not in ("_target_", "name") and (key not in known or key in ours):
                raise unknown_key(group, key, known.keys() - ours, value)


def build_clip(cfg: DictConfig) -> FrozenCLIP:
    """The frozen CLIP of `cfg.clip`; the same one as long as anything in this process has it, and
    with the weights of one that differs in its layer.

    Raises:
        ConfigError: a name, weights or layer that cannot be used.
    """
    options = plain(cfg.clip)
    key, model = json.dumps(options), json.dumps({**options, "layer": None})
    clip = _clips.get(key)
    if clip is None:
        other = _models.get(model)
        if other is None:
            clip = _models[model] = user_error(FrozenCLIP.load, **options)
        else:
            clip = other.at(options["layer"])
        _clips[key] = clip
    return clip


def build_dataset(node: DictConfig, split: str, image_size: int) -> ImageDataset:
    """One split of a dataset; the same one as long as anything in this process has it, so that a
    million files are listed once.

    Args:
        node: `cfg.dataset` or `cfg.train_dataset`.
        split: "train" or "test".
        image_size: pixels a side, the CLIP's.

    Raises:
        ConfigError: nothing there, not laid out as it should be, or a class that lacks what a
            dataset has.
    """
    options = {key: value for key, value in plain(node).items() if key != "name"}
    options |= {"split": split, "image_size": image_size}
    key = json.dumps(options)
    dataset = _datasets.get(key)
    if dataset is None:
        dataset = user_error(call_target, options)
        # Of the class first, as a property may be slow.
        has = {name: hasattr(type(dataset), name) or hasattr(dataset, name) for name in DATASET}
        if absent := [name for name in DATASET if not has[name]]:
            raise ConfigError(
                f"{options['_target_']}: its datasets lack {', '.join(absent)}; expected are "
                f"{', '.join(DATASET)}, as clipsae.data.ImageDataset describes them"
            )
        _datasets[key] = dataset
    return dataset


def decisive(group: str, node: DictConfig | dict[str, Any]) -> dict[str, Any]:
    """What of a group of the config decides a result."""
    options = plain(node) if isinstance(node, DictConfig) else node
    return {key: value for key, value in options.items() if key not in UNDECISIVE[group]}


def sae_options(cfg: DictConfig) -> dict[str, Any]:
    """What `SAE` is built with."""
    return decisive("model", cfg.model)


def training_options(cfg: DictConfig) -> dict[str, Any]:
    """What `SAEModule` is built with."""
    of_model = {key: cfg.model[key] for key in TRAINING_KEYS if key in cfg.model}
    return {**plain(cfg.optimizer), **of_model}


def build_sae(cfg: DictConfig, d: int) -> SAE:
    """A new SAE for tokens of width d.

    Raises:
        ConfigError: an option that does not exist or is invalid.
    """
    options = sae_options(cfg)
    of = {name: cfg.features[name] for name in TOKEN_KEYS}
    try:
        return SAE(d=d, **options, **of)
    except ValueError as error:
        name = str(error).partition("=")[0]
        raise ConfigError(f"{'model.' * (name in options)}{error}") from error


def clip_key(cfg: DictConfig) -> dict[str, Any]:
    """What decides the tokens: the model, its weights (a file by its content), the layer and hook,
    the precision."""
    key = plain(cfg.clip) | {"precision": precision.of_clip(cfg)}
    if key.get("image_size") is None:  # the model's own, as where it is not given
        key.pop("image_size", None)
    if key.get("hook") == "resid":  # as where it is not given
        key.pop("hook")
    elif key.get("hook") in EMBEDDINGS:  # of all layers alike
        key.pop("layer")
    weights = FrozenCLIP.weights_file(key["name"], key["pretrained"])
    if weights is not None:
        key["pretrained"] = _content(weights, weights.stat().st_mtime_ns)
    return key


@cache
def _content(file: Path, modified: int) -> str:
    # Every stage of a run asks for it, and weights can be gigabytes.
    return sha256(file)


def dataset_key(node: DictConfig, dataset: ImageDataset) -> dict[str, Any]:
    """What decides the images: the options, and the list of files by content where there is one.

    That images which cannot be read are left out (`on_bad_image: skip`) decides nothing where there
    are none.
    """
    options = decisive("dataset", node)
    # The module's earlier name, so that what was made under it is found.
    target = options["_target_"].replace("clipsae.data.published.", "clipsae.data.eleven.")
    return {
        **options,
        "_target_": target,
        "fingerprint": dataset.fingerprint,
        "left_out": leaves_out(dataset),
    }


def cell(cfg: DictConfig) -> dict[str, Any]:
    """What tells a result from the others of a sweep; the first columns of every table."""
    return {
        "model": cfg.model.name,
        "dataset": cfg.dataset.name,
        "clip": cfg.clip.name,
        "latents": cfg.model.latents,
        "k": cfg.model.get("k"),
        "seed": cfg.seed,
    }


def title(cfg: DictConfig, saes: int = 1) -> str:
    """What is worked on, for a bar: "topk k=16 on dtd"."""
    k = cfg.model.get("k")
    what = f"{saes} SAEs" if saes > 1 else cfg.model.name + ("" if k is None else f" k={k}")
    return f"{what} on {cfg.dataset.name}"


def limit_images(cfg: DictConfig) -> int | None:
    """How many images are evaluated; None: all. With random CLIP weights, whose numbers mean
    nothing, a few are enough to see that everything runs."""
    if cfg.evaluation.limit_images is None and cfg.clip.pretrained is None:
        return IMAGES_WITH_RANDOM_WEIGHTS
    return cfg.evaluation.limit_images


def at_most(cfg: DictConfig, images: int) -> int:
    """How many images are looked at where a task has a limit of its own, too."""
    limit = limit_images(cfg)
    return images if limit is None else min(images, limit)


def best_device() -> torch.device:
    """The GPU where there is one; of a distributed run's process its own.

    A rank's GPU is that of its number on its machine, as for Lightning. Where SLURM shows each
    task its own GPU alone, that one is the first.
    """
    if not torch.cuda.is_available():
        return torch.device("cpu")
    rank = int(os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", 0)))
    return torch.device("cuda", rank if rank < torch.cuda.device_count() else 0)


def save_config(cfg: DictConfig, folder: Path) -> None:
    """The resolved config beside the result."""
    (folder / "config.yaml").write_text(OmegaConf.to_yaml(cfg, resolve=True))


def user_error(build: Any, *args: Any, **options: Any) -> Any:
    """Call `build`; what it refuses is shown to the user as one line.

    Raises:
        ConfigError: in place of ValueError, FileNotFoundError and NotADirectoryError.
    """
    try:
        return build(*args, **options)
    except (ValueError, FileNotFoundError, NotADirectoryError) as error:
        raise ConfigError(str(error)) from error

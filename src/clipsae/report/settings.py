"""What decides a result, as flat settings by the names of the config: "trainer.max_steps", ...

They are read from the keys of the store's stages, where everything that decides a content is, so
that no option can be forgotten here.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from clipsae.overrides import flat

Settings = tuple[tuple[str, str], ...]  # names and values, sorted
NOT_SET = "not set"
# What a cell of the tables is known by anyway.
_CELL = ("model.k", "model.latents", "trainer.seed", "features.seed", "evaluation.protocol")
# What chooses which figures there are, and leaves each of them as it is.
_CHOICES = ("evaluation.ns", "evaluation.settings", "measurement.metrics")
# The image encoder's figures have tables of their own.
_APART = ("measurement.image_encoder",)
# Of key["training"], whose other entries are of conf/model.
_FEATURES = ("batch_size", "shuffle_buffer_images", "cache", "block_images", "buffer_images")
_OPTIMIZER = ("learning_rate", "betas", "warmup_steps", "decay")
_TRAINER = ("max_steps", "precision", "gradient_clip_val", "batches_a_step", "seed")
_PLACES = {
    **dict.fromkeys(_FEATURES, "features"),
    **dict.fromkeys(_OPTIMIZER, "optimizer"),
    **dict.fromkeys(_TRAINER, "trainer"),
}
# Of a config, for results whose SAE is no longer there to be asked: what decides nothing.
_IDLE = re.compile(
    r"model\.(name|compile)|(.*\.)?(_target_|root|download|num_workers|pin_memory|folder)"
    r"|trainer\.(accelerator|devices|num_nodes|strategy|log_every_n_steps|val_check_interval"
    r"|limit_val_batches|num_sanity_val_steps|enable_.*)|evaluation\.batch_size"
)


def settings_of(
    key: Mapping[str, Any], of_sae: Mapping[str, Any], config: Mapping[str, Any], schema: Any
) -> Settings:
    """Everything that decides a result but its cell's model, k, M and seed.

    Args:
        key: of the evaluation.
        of_sae: key of its SAE; empty: not known, the config's settings stand for it.
        config: resolved, of the run that made it.
        schema: of the key.
    """
    named = dict(_of_sae(of_sae) if of_sae else _of_config(config))
    trained_on = config.get("train_dataset", {"_target_": ""}) or {}
    if trained_on == config.get("dataset") or "_target_" not in trained_on:
        named = _trained_on_itself(named)
    for name, value in flat({k: v for k, v in key.items() if k != "sae"}):
        named[_of_result(name)] = value
    if not key:
        named |= config_settings(config, ("dataset", "evaluation"))
    if schema is not None:
        named["schema"] = str(schema)
    left_out = {*_CELL, *_CHOICES, *_APART}
    return tuple(sorted((n, v) for n, v in named.items() if n not in left_out))


def of_topn(settings: Settings) -> Settings:
    """Those that decide accuracies."""
    return tuple((name, value) for name, value in settings if not name.startswith("measurement."))


def of_metrics(settings: Settings) -> Settings:
    """Those that decide what is measured."""
    return tuple((n, v) for n, v in settings if is_of_codes(n) or n.startswith("measurement."))


def is_of_codes(name: str) -> bool:
    """Whether a setting decides an SAE's codes on the images."""
    if name in ("evaluation.split", "evaluation.limit_images"):
        return True
    return not name.startswith(("evaluation.", "measurement."))


def _of_sae(key: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for name, value in flat(key):
        group, _, rest = name.partition(".")
        if group == "sae":
            name = f"model.{rest}"
        elif group == "training":
            first = rest.partition(".")[0]
            known = first in ("trainer", "features")  # "training.trainer.max_steps"
            name = rest if known else f"{_PLACES.get(first, 'model')}.{rest}"
        yield name, value


def _of_result(name: str) -> str:
    """A name of an evaluation's key as the config has it."""
    if name in ("split", "limit_images"):
        return f"evaluation.{name}"
    return name


def _trained_on_itself(named: dict[str, str]) -> dict[str, str]:
    """Of an SAE that is trained on the dataset it is evaluated on: its images are the dataset's."""
    kept = {n: v for n, v in named.items() if not n.startswith("train_dataset.")}
    kept["train_dataset.name"] = "the dataset itself"
    if "train_dataset.fingerprint" in named:
        kept["dataset.train_fingerprint"] = named["train_dataset.fingerprint"]
    return kept


def _of_config(config: Mapping[str, Any]) -> dict[str, str]:
    features = {k: v for k, v in (config.get("features") or {}).items() if k in _FEATURES}
    named = config_settings(config, ("clip", "model", "optimizer", "train_dataset", "trainer"))
    return named | config_settings({"features": features}, ("features",))


def config_settings(config: Mapping[str, Any], groups: tuple[str, ...]) -> dict[str, str]:
    """Settings of groups of a resolved config, but for those that decide no result."""
    chosen = {group: config[group] for group in groups if config.get(group)}
    return {name: value for name, value in flat(chosen) if not _IDLE.fullmatch(name)}

"""What decides a result, as flat settings by the names of the config ("trainer.max_steps", ...),
and which of them differ between results.

They are read from the keys of the store's stages, where everything that decides a content is, so
that no option can be forgotten here. Two results may be averaged if all settings that decide them
are the same but the seed. Otherwise each is a line of its own in the tables.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from clipsae.overrides import flat
from clipsae.report.names import dataset_title, listed, model_title
from clipsae.rules import PRECISIONS
from clipsae.store.survey import short
from clipsae.training.baselines import learned

Settings = tuple[tuple[str, str], ...]  # names and values, sorted
NOT_SET = "not set"
_LEFT_OUT = (
    # What a cell of the tables is known by anyway.
    *("model.k", "model.latents", "trainer.seed", "features.seed"),
    *("evaluation.protocol", "evaluation.ranking", "model.fit", "model.freeze"),
    # What chooses which figures there are, and leaves each of them as it is.
    *("evaluation.ns", "evaluation.settings", "measurement.metrics"),
    # The image encoder's figures have tables of their own.
    "measurement.image_encoder",
)
# Of key["training"], whose other entries are of conf/model.
_FEATURES = (
    *("batch_size", "shuffle_buffer_images", "cache", "block_images", "buffer_images"),
    *("tokens", "max_norm_ratio"),
)
_GROUPS = {
    **dict.fromkeys(_FEATURES, "features."),
    **dict.fromkeys(
        (
            *("learning_rate", "betas", "warmup_steps", "decay", "decay_fraction"),
            *("sparsity_warmup_steps", "reference_latents"),
        ),
        "optimizer.",
    ),
    **dict.fromkeys(
        ("max_steps", "precision", "gradient_clip_val", "batches_a_step", "seed"), "trainer."
    ),
    **dict.fromkeys(("trainer", "features"), ""),
}
# What the keys say of a training -> the value of `precision`.
_PRECISIONS = {of_training: value for value, (_, of_training) in PRECISIONS.items()}
# Of a config, for results whose SAE is no longer there to be asked: what decides nothing.
_IDLE = re.compile(
    r"model\.(name|compile)|(.*\.)?(_target_|root|download|num_workers|pin_memory|folder)"
    r"|trainer\.(accelerator|devices|num_nodes|strategy|log_every_n_steps|val_check_interval"
    r"|limit_val_batches|num_sanity_val_steps|enable_.*)|evaluation\.batch_size"
)
# What belongs to a model, so that different models are expected to differ.
_OF_MODEL = (
    *("model.", "optimizer.", "plugins"),
    *("trainer.gradient_clip", "evaluation.count_threshold"),
)
# How much of an SAE was learned, as `learned_by` calls it: all of it, nothing, nothing as it was
# fitted without steps, or a part; and what asks for it.
TRAINED, UNTRAINED, FITTED = "", "untrained", "fitted"
_FROZEN = {
    "decoder": "decoder frozen",
    "encoder": "encoder frozen",
    "soft_decoder": "decoder softly frozen",
}
_ASKED = {said: f"model.freeze={value}" for value, said in _FROZEN.items()}
_ASKED[UNTRAINED] = "trainer.max_steps=0"
NOT_LEARNED = (UNTRAINED, FITTED)
# What decides nothing in an SAE that is not trained.
_OF_TRAINING = ("trainer.", "optimizer.", "features.")

_OVERRIDE = re.compile(
    r"(?!\w+\.batches_a_step)(trainer|model|optimizer|features|evaluation)\.[\w.]+=\S+"
    r"|precision=\S+"
)


def learned_by(config: Mapping[str, Any]) -> str:
    """How much of an SAE was learned, from the config of its run: `TRAINED` in full, "decoder
    frozen" and the like in part, `UNTRAINED` and `FITTED` (`model.fit`) not at all."""
    model = config.get("model") or {}
    if learned(config) == "not learned":
        return UNTRAINED if model.get("fit") is None else FITTED
    return _FROZEN.get(str(model.get("freeze")), TRAINED)


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
    if of_sae:
        named = {_config_name(name): value for name, value in flat(of_sae)}
    else:
        features = {k: v for k, v in (config.get("features") or {}).items() if k in _FEATURES}
        groups = ("clip", "model", "optimizer", "train_dataset", "trainer", "features")
        named = config_settings({**config, "features": features}, groups)
        if "precision" in config:
            named["precision"] = config["precision"]
    if named.get("trainer.precision") in _PRECISIONS:
        named["precision"] = _PRECISIONS[named.pop("trainer.precision")]
    trained_on = config.get("train_dataset", {"_target_": ""}) or {}
    if trained_on == config.get("dataset") or "_target_" not in trained_on:
        images = named.get("train_dataset.fingerprint")
        named = {n: v for n, v in named.items() if not n.startswith("train_dataset.")}
        named["train_dataset.name"] = "the dataset itself"
        named |= {} if images is None else {"dataset.train_fingerprint": images}
    for name, value in flat({k: v for k, v in key.items() if k != "sae"}):
        named[f"evaluation.{name}" if name in ("split", "limit_images") else name] = value
    if not key:
        named |= config_settings(config, ("dataset", "evaluation"))
    if schema is not None:
        named["schema"] = str(schema)
    kept = set()
    if (learnt := learned_by(config)) in NOT_LEARNED:
        named = {n: v for n, v in named.items() if not n.startswith(_OF_TRAINING)}
        kept = {"model.latents"} if learnt == FITTED else set()  # reports have those of any M
    return tuple(sorted((n, v) for n, v in named.items() if n in kept or n not in _LEFT_OUT))


def config_settings(config: Mapping[str, Any], groups: Iterable[str]) -> dict[str, str]:
    """Settings of groups of a resolved config, but for those that decide no result."""
    chosen = {group: config[group] for group in groups if config.get(group)}
    return {name: value for name, value in flat(chosen) if not _IDLE.fullmatch(name)}


def decides_codes(name: str) -> bool:
    """Whether a setting decides an SAE's codes on the images."""
    always = ("evaluation.split", "evaluation.limit_images")
    return name in always or not name.startswith(("evaluation.", "measurement."))


def _config_name(name: str) -> str:
    """The config's name of an entry of an SAE's key."""
    group, _, rest = name.partition(".")
    if group == "training":
        return _GROUPS.get(rest.partition(".")[0], "model.") + rest
    return f"model.{rest}" if group == "sae" else name


# --- which of them differ ---


@dataclass(frozen=True, order=True)
class Line:
    """A row of the tables: a model by the settings of its results."""

    model: str
    # Those of the settings that are not the model's own and that differ in the report, such as
    # "trainer.max_steps=3", as few as distinguish the lines.
    common: str = ""
    own: str = ""  # the model's own settings that differ between its results
    unlike: int = field(default=0, compare=False)  # differing settings that are not as usual
    learned: str = TRAINED  # see `learned_by`

    @property
    def variant(self) -> str:
        """What sets it apart; "" where nothing does."""
        learned = "" if self.learned == FITTED else self.learned  # the model's name says it
        return ", ".join(label for label in (learned, self.common, self.own) if label)

    @property
    def title(self) -> str:
        """The model as the paper writes it, and what sets its line apart."""
        return ", ".join(filter(None, (model_title(self.model), self.variant)))

    @property
    def overrides(self) -> list[str]:
        """Those of `variant` that a command line can ask for."""
        words = [_ASKED.get(word, word) for word in self.variant.split(", ")]
        return [word for word in words if _OVERRIDE.fullmatch(word)]


# Settings that labels prefer to others that differ with them: a transcoder is one by its
# `target_layer`, whose bias cannot be subtracted either.
_FIRST = ("trainer.max_steps", "precision", "schema", "model.target_layer", "model.prefixes")
BY_LINE = ("model", "learned", "dataset", "settings")  # what decides a figure's line


def set_apart(figures: pd.DataFrame, usual: Mapping[str, str]) -> tuple[pd.DataFrame, list[str]]:
    """Give every row its `Line`, as the column `line`.

    Args:
        figures: with columns model, learned, dataset, folder, settings.
        usual: settings by name; those that are not there are not compared.

    Returns:
        The frame, and a sentence for each setting that differs.
    """
    names = ["model", "learned", "dataset", "folder", "settings"]
    results = figures[names].drop_duplicates(ignore_index=True)
    values = pd.DataFrame([dict(s) for s in results.settings], results.index, dtype=object)
    not_trained = results.learned.isin(NOT_LEARNED)
    for name in values:  # whoever lacks one of these has another value; of others nothing is known
        if decides_codes(name):  # (what has not learned has no settings of a training)
            values[name] = values[name].fillna(NOT_SET).mask(not_trained & values[name].isna())
    common = _varying(results, values[[name for name in values if not name.startswith(_OF_MODEL)]])
    sentences = [_sentence(name, results, values) for name in common]
    for name in common:  # every dataset has a hash of its images: of interest if it has several
        if name.startswith("dataset.") and name.endswith("fingerprint"):
            several = values[name].groupby(results.dataset).transform("nunique") > 1
            values[name] = values[name].where(several)
    labels, unlike = _labels(values[common]), pd.Series(0, values.index)
    for name in usual.keys() & set(common):
        unlike += ~values[name].isin([usual[name], NOT_SET, float("nan")])
    lines: dict[tuple[Any, ...], Line] = {}
    for model, mine in results.groupby("model"):
        own = _varying(mine, values.loc[mine.index, [n for n in values if n.startswith(_OF_MODEL)]])
        sentences += [f"{model_title(model)}: {_sentence(n, mine, values)}" for n in own]
        own_labels = _labels(values.loc[mine.index, own])
        for at, row in zip(mine.index, mine.itertuples(), strict=True):
            line = Line(model, labels[at], own_labels[at], unlike[at], row.learned)
            lines[tuple(getattr(row, name) for name in BY_LINE)] = line
    return figures.assign(line=_looked_up(figures, lines)), sentences


def like(figures: pd.DataFrame, others: pd.DataFrame) -> pd.DataFrame:
    """Those of `others` that share a line with some of `figures`, with it: the same models trained
    and evaluated in the same way but for the protocol and the ranking."""
    rows = figures.drop_duplicates(list(BY_LINE))
    lines = dict(zip(zip(*(rows[name] for name in BY_LINE), strict=True), rows.line, strict=True))
    found = others.assign(line=_looked_up(others, lines))
    return found[found.line.notna()]


def _looked_up(figures: pd.DataFrame, lines: Mapping[tuple[Any, ...], Line]) -> pd.Series:
    keys = zip(*(figures[name] for name in BY_LINE), strict=True)
    return pd.Series([lines.get(key) for key in keys], figures.index, dtype=object)


def _varying(results: pd.DataFrame, values: pd.DataFrame) -> list[str]:
    """Names of the settings that differ, in the order in which labels prefer them.

    A setting of a dataset may differ between datasets. Results of another schema are compared
    among themselves: their settings may have other names.
    """
    schema = results.settings.map(lambda settings: dict(settings).get("schema", ""))
    first = [name for name in _FIRST if name in values]

    def differs(name: str, *by: pd.Series) -> bool:
        groups = values[name].groupby(list(by), dropna=False) if by else values[name]
        return bool(np.any(groups.nunique() > 1))

    found = []
    for name in (*first, *sorted(set(values) - set(first))):
        by = [schema] * (name != "schema") + [results.dataset] * name.startswith("dataset.")
        if differs(name, *by):
            found.append(name)
    # Without the hashes of images where another setting says why they differ.
    for name in [n for n in found if n.endswith("fingerprint")]:
        if not differs(name, results.dataset, *(values[n] for n in found if n != name)):
            found.remove(name)
    return found


def _labels(values: pd.DataFrame) -> dict[int, str]:
    """By row a label that distinguishes its settings from the others' by as few as are needed."""
    known = values.fillna(NOT_SET)
    chosen: list[str] = []

    def parts(names: list[str]) -> int:
        return len(known[names].drop_duplicates()) if names else 1

    while parts(chosen) < parts(list(known)):
        chosen.append(max(known, key=lambda name: parts([*chosen, name])))
    return {
        at: ", ".join(f"{name}={short(row[name])}" for name in chosen if row[name] != NOT_SET)
        for at, row in known.to_dict("index").items()
    }


def _sentence(name: str, results: pd.DataFrame, values: pd.DataFrame) -> str:
    """How many results have which value of a setting."""
    known = results.assign(value=values[name]).dropna(subset="value").drop_duplicates("folder")
    places = known.model.map(model_title) + " on " + known.dataset.map(dataset_title)
    counts = known.value.value_counts(sort=False).sort_values(ascending=False, kind="stable")
    parts = []
    for value, count in counts.items():
        where = places[known.value == value].unique()
        of_places = f" ({', '.join(where)})" if len(where) <= 2 else ""
        parts.append(f"{short(str(value))} in {count} result{'s' * (count != 1)}{of_places}")
    hashed = " (a hash of the images that were {} on)"
    explained = {
        "schema": " (of what the code computes; a smaller number is an older version)",
        "dataset.fingerprint": hashed.format("evaluated"),
        "dataset.train_fingerprint": hashed.format("trained"),
        "train_dataset.fingerprint": hashed.format("trained"),
    }
    return f"{name}{explained.get(name, '')} is {listed(parts)}."

"""Why a command line does not compose, in one sentence with similar names."""

import json
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException, MissingConfigException
from omegaconf import DictConfig, OmegaConf

from clipsae.rules import PRECISIONS, similar

RENAMED = {
    **{
        f"model.{key}": f"optimizer.{key}"
        for key in ("learning_rate", "betas", "warmup_steps", "decay")
    },
    "model.count_threshold": "evaluation.count_threshold",
    "model.l0": "model.l0_coefficient",
    "model.l1": "model.l1_coefficient",
    "model.normalize_input": "model.normalize",
    "task.words": "naming.vocabulary",
    "features.shuffle_tokens": "features.shuffle_buffer_images",
    **dict.fromkeys(("clip.precision", "trainer.precision"), f"precision={'|'.join(PRECISIONS)}"),
}


def explain(error: Exception, conf: Path) -> str:
    """What is wrong with the overrides of this process's command, and what to write instead.

    Args:
        error: that Hydra or OmegaConf raised while it composed.
        conf: the folder of the configs.
    """
    if isinstance(error, MissingConfigException) and error.options:
        group, _, choice = str(error.missing_cfg_file).rpartition("/")
        return f"{group}={choice}: there is no such choice; {near(choice, error.options)}"
    causes = [str(one).strip() for one in (error, error.__cause__) if one is not None]
    said = [text for text in causes if text] or [type(error).__name__]
    if match := re.match(r"Could not override '([^']+)'", said[0]):
        return _unknown(match[1].partition("@")[0], conf)
    if match := re.match(r"Could not append to config\. An item is already at '([^']+)'", said[0]):
        return f"{_given(match[1])}: it is there already: leave out the +"
    if match := re.match(r"Ambiguous value for argument '([^']+)'", said[0]):
        return f"{match[1]}: several values are a sweep: add -m; a list is written key=[a,b]"
    if match := re.match(r"Error parsing override '([^']*)'\s*(.*)", said[0]):
        return f"{match[1]!r} is not key=value: {match[2]}"
    # The first lines say it; the rest is where in Hydra's own terms.
    return ": ".join(text.splitlines()[0] for text in said)


def renamed(config: Mapping[str, Any]) -> dict[str, tuple[str, Any]]:
    """The keys of a config that have another name now: old name -> new name and value.

    One that stays in its group may be a plugin's own, unless the new name is there, too.
    """
    found = {}
    for old, new in RENAMED.items():
        group, _, key = old.partition(".")
        new_group, _, new_key = new.rpartition(".")
        node = config.get(group) or {}
        if key in node and (group != new_group or new_key in node):
            found[old] = new, node[key]
    return found


def near(name: str, known: Iterable[str], group: str = "") -> str:
    """The similar names, or all there are.

    Args:
        group: that the names belong to, for the answer.
    """
    known = sorted(one for one in known if not one.startswith("_"))
    prefix = f"{group}." if group else ""
    if close := similar(name, known):
        return f"did you mean {' or '.join(prefix + one for one in close)}?"
    if not known:
        return "see --help"
    return f"{group} has {', '.join(known)}" if group else f"there are {', '.join(known)}"


def _unknown(key: str, conf: Path) -> str:
    """That a key does not exist, from the first part of it that does not."""
    if key in RENAMED:
        return f"{_given(key)}: {key} is now {RENAMED[key]}"
    node, parts = _composed(conf), key.split(".")
    for i, part in enumerate(parts):
        known = [str(one) for one in node] if isinstance(node, DictConfig) else []
        if part not in known:
            group = ".".join(parts[:i])
            hint = near(part, known, group)
            if others := _choices_with(conf, group, part):
                hint = f"it is an option of {group}={', '.join(others)}"
                if node.get("fit"):
                    hint = f"model={node.name} is fitted, not trained; {hint}"
            return f"{_given(key)}: there is no such option; {hint}"
        node = node._get_node(part)
    return f"{_given(key)}: there is no such option"


def _choices_with(conf: Path, group: str, key: str) -> list[str]:
    """The choices of a group whose configs have a key."""
    files = sorted((conf / group).glob("[!_]*.yaml")) if group else []
    return [file.stem for file in files if key in with_bases(file)]


def _composed(conf: Path) -> DictConfig:
    """The config with only the groups that the command chooses."""
    choices = [a for a in sys.argv[1:] if re.fullmatch(r"[\w/]+=[\w-]+", a)]
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(conf), version_base="1.3"):
        for overrides in (choices, []):
            try:
                return compose("config", overrides, return_hydra_config=True)
            except HydraException:
                continue
    return OmegaConf.create()


def with_bases(file: Path) -> DictConfig:
    """A config on top of those beside it that its defaults name, as Hydra composes them."""
    config = OmegaConf.load(file) or OmegaConf.create()
    names = [name for name in config.get("defaults", []) if type(name) is str]
    bases = [file.with_name(f"{name}.yaml") for name in names]
    return OmegaConf.merge(*(with_bases(base) for base in bases if base.is_file()), config)


def _given(key: str) -> str:
    """The override as it was written."""
    found = [a for a in sys.argv[1:] if a.lstrip("+~").partition("=")[0] == key]
    return found[0] if found else key


def flat(node: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Dotted names and values as text of a nested mapping."""
    for name, value in node.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{name}.")
        else:
            text = json.dumps(value, separators=(",", ":"), default=str)
            yield f"{prefix}{name}", value if isinstance(value, str) else text

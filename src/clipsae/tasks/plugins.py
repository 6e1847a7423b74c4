"""Files of one's own: `plugins` names modules that are imported before a task runs.

A plugin registers what it defines, such as an activation of an SAE; a YAML of its own, in any
folder given to Hydra by `--config-dir`, chooses it:

    # mine/softplus.py                          # mine/model/softplus.yaml
    @ACTIVATIONS.register("softplus")           # @package _global_
    class Softplus(Activation): ...             plugins: [softplus.py]
                                                model: {name: softplus, activation: softplus, ...}

    python run.py --config-dir mine model=softplus
"""

import hashlib
import importlib.util
import sys
from pathlib import Path

from omegaconf import DictConfig

from clipsae.errors import ConfigError
from clipsae.store.files import sha256

_PREFIX = "clipsae_plugin_"  # of their modules' names


def load(cfg: DictConfig) -> None:
    """Import the plugins, each once in a process.

    Raises:
        ConfigError: one that is not there.
    """
    for path in _files(cfg):
        name = _module_name(path)
        if name in sys.modules:
            continue
        spec = importlib.util.spec_from_file_location(name, path)
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[name]
            raise


def digests(cfg: DictConfig, *, measuring: bool) -> list[str]:
    """SHA-256 of each plugin's file: what it defines decides what is trained, or only what is
    measured, if metrics are all that it registers.

    Args:
        measuring: those of the second kind; else those of the first.
    """
    if not (files := _files(cfg)):
        return []
    from clipsae.evaluation.metrics import METRICS  # imports torch
    from clipsae.sae import ACTIVATIONS, ARCHITECTURES, OBJECTIVES

    load(cfg)
    parts = (ACTIVATIONS, ARCHITECTURES, OBJECTIVES)
    trained = {c.__module__ for known in parts for c in known.values()}
    alone = {metric.__module__ for metric in METRICS.values()} - trained
    return [sha256(path) for path in files if (_module_name(path) in alone) == measuring]


def of_others(cfg: DictConfig, cls: type) -> bool:
    """Whether a plugin defines a class that another run in this process has named alone."""
    module = cls.__module__
    return module.startswith(_PREFIX) and module not in map(_module_name, _files(cfg))


def _module_name(path: Path) -> str:
    return f"{_PREFIX}{hashlib.sha256(str(path).encode()).hexdigest()[:8]}_{path.stem}"


def _files(cfg: DictConfig) -> list[Path]:
    """Their files: relative to a folder of configs, or to the current one."""
    if not cfg.plugins:
        return []
    from hydra.core.hydra_config import HydraConfig

    sources = HydraConfig.get().runtime.config_sources
    paths = [Path(s.path) for s in sources if s.schema == "file"]
    folders = list(dict.fromkeys([*paths, Path.cwd()]))
    found = []
    for name in cfg.plugins:
        there = [folder / name for folder in folders if (folder / name).is_file()]
        if not there:
            raise ConfigError(
                f"plugins: {name} is in none of {', '.join(map(str, folders))}: give a Python file "
                "in one of them, or its whole path"
            )
        found.append(there[0].resolve())
    return found

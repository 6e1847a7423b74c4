"""The commands of the documentation as the tests run them: in forks, at small sizes."""

import os
import re
import runpy
import shlex
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from run import ROOT

# Appended to every command that trains or evaluates.
SMALL = {
    "model.latents": "64",
    "trainer.max_steps": "2",
    "optimizer.sparsity_warmup_steps": "0",
    "trainer.val_check_interval": "2",
    "trainer.limit_val_batches": "1",
    "trainer.accelerator": "cpu",
    "features.num_workers": "0",
    "evaluation.ns": "[1,5]",
    "measurement.sample_tokens": "200",
    "measurement.sample_images": "4",
}
SCENES = 24  # images of each split, trained on in batches of 4


def simple_commands(line: str) -> Iterator[tuple[dict[str, str], list[str]]]:
    """Variables and words of the commands of a line of shell, which may be joined by `&&`."""
    words = shlex.split(line, comments=True)
    while words:
        end = words.index("&&") if "&&" in words else len(words)
        command, words = words[:end], words[end + 1 :]
        variables = {}
        while "=" in command[0]:
            name, _, variables[name] = command.pop(0).partition("=")
        yield variables, command


def python(*arguments: str) -> None:
    """What `python` with these arguments does in a test."""
    for path in filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep)):
        sys.path.insert(0, str(Path(path).resolve()))
    if arguments[0] == "run.py":
        from clipsae.cli import main

        sys.argv = list(arguments)
        main()
    elif arguments[:3] == ("-m", "pip", "install"):
        # The tests' environment has what this would install; its extras must exist.
        project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        extras = {name for one in arguments for name in re.findall(r"\[(.*)\]", one)}
        assert extras <= set(project["optional-dependencies"]), extras
    elif arguments[:2] == ("-m", "clipsae.pretraining"):
        from clipsae.pretraining.__main__ import parse

        parse(list(arguments[2:]))  # it would take half an hour
    elif arguments[0].endswith(".py"):
        benchmark = arguments[0].startswith("tests/benchmarks/")  # takes minutes
        sys.argv = [arguments[0], "--help"] if benchmark else list(arguments)
        sys.path.insert(0, str(Path(arguments[0]).resolve().parent))
        runpy.run_path(arguments[0], run_name="__main__")
    elif arguments[:2] != ("-m", "pytest"):
        sys.exit(f"python {shlex.join(arguments)}: the documentation's tests do not know this")


def compose(words: list[str], folder: Path) -> Any:
    """The config of a command, of a sweep's first cell, with its launcher resolved.

    Args:
        words: what follows `run.py`.
        folder: where the command is given.

    Raises:
        hydra's errors: the command is wrong.
    """
    import hydra
    from hydra import initialize_config_dir
    from hydra._internal.utils import get_args_parser
    from hydra.core.global_hydra import GlobalHydra
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from omegaconf import OmegaConf

    args = get_args_parser().parse_args(words)
    cell = []
    for override in OverridesParser.create().parse_overrides(args.overrides):
        value = override.input_line
        if override.is_sweep_override():
            value = f"{value.partition('=')[0]}={next(override.sweep_string_iterator())}"
        cell.append(value)
    if args.config_dir:
        path = (folder / args.config_dir).resolve()
        cell.append(f"hydra.searchpath=[file://{ROOT},file://{path}]")
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        cfg = hydra.compose("config", cell, return_hydra_config=True)
        given = {one.partition("=")[0] for one in cell}
        axes = {key: values for key, values in sweep_axes(cfg).items() if key not in given}
        if axes:
            cell += [f"{key}={values[0]}" for key, values in axes.items()]
            cfg = hydra.compose("config", cell, return_hydra_config=True)
    OmegaConf.to_container(cfg.hydra.launcher, resolve=True)
    return cfg


def sweep_axes(cfg: Any) -> dict[str, list[str]]:
    """What the sweep of a config runs over; nothing where one run is asked for."""
    if not str(cfg.hydra.mode).endswith("MULTIRUN"):
        return {}
    grids = cfg.hydra.sweeper.get("grids") or {}
    axes = {**next(iter(grids.values()), {}), **cfg.hydra.sweeper.params}
    return {key: str(values).split(",") for key, values in axes.items()}


def shrunken(words: list[str], cfg: Any, clip: str | None = None) -> list[str]:
    """Words that do the same in seconds: two cells of a sweep, few images and steps.

    Args:
        words: what follows `run.py`.
        cfg: what they compose to.
        clip: in place of the command's.
    """
    if {"--help", "--cfg"} & set(words):
        return words
    if clip is not None:
        words = [f"clip={clip}" if one.startswith("clip=") else one for one in words]
        words = [one for one in words if not one.startswith("clip.")]
    small = dict(SMALL)
    if cfg.model.latents is None:  # the data decide
        del small["model.latents"]
    for group in ("dataset", "train_dataset"):
        if "Scenes" in cfg[group].get("_target_", ""):
            small[f"++{group}.size"] = str(SCENES)
            # Other images stay as many as they are: enough for a batch, as the command is written.
            if group == "train_dataset":
                small["features.batch_size"] = "4"
        if "clipsae.data.published" in cfg[group].get("_target_", ""):
            small[f"++{group}.templates"] = "dataset"  # one; 80 for 1,000 classes take a minute
    if cfg.task.get("seconds") is not None:
        small["task.seconds"] = "0.01"
    given = {one.partition("=")[0] for one in words}
    if not any(key.startswith("logger") for key in given):
        small["logger"] = "none"
    cells = 2  # of the first axis; one of the others
    for key, values in sweep_axes(cfg).items():
        if len(values) > 1:
            if key not in given:
                small[key] = ",".join(values[:cells])
            cells = 1
    return [*words, *(f"{key}={value}" for key, value in small.items())]

"""What the documentation's commands become in a test: first composed as written, then run small."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Appended to every command that trains or evaluates.
SMALL = {
    "model.latents": "64",
    "trainer.max_steps": "2",
    "trainer.val_check_interval": "2",
    "trainer.limit_val_batches": "1",
    "trainer.accelerator": "cpu",
    "features.batch_size": "4",
    "features.num_workers": "0",
    "evaluation.ns": "[1,5]",
    "measurement.sample_tokens": "200",
}
SCENES = 24  # images of each split
CELLS = 2  # of each axis of a sweep


@dataclass(frozen=True)
class Command:
    """Arguments of run.py, apart.

    Attributes:
        flags: such as -m, --cfg job.
        config_dir: the folder of --config-dir.
        overrides: the rest.
    """

    flags: tuple[str, ...]
    config_dir: str | None
    overrides: tuple[str, ...]


def parse(arguments: Sequence[str]) -> Command:
    """Raises ValueError for a flag that is not known here."""
    flags, overrides, config_dir = [], [], None
    rest = list(arguments)
    while rest:
        word = rest.pop(0)
        if word in ("--cfg", "--package"):
            flags += [word, rest.pop(0)]
        elif word == "--config-dir":
            config_dir = rest.pop(0)
        elif word in ("-m", "--multirun", "--help", "--resolve"):
            flags.append(word)
        elif word.startswith("-"):
            raise ValueError(f"{word}: the documentation's tests do not know this flag")
        else:
            overrides.append(word)
    return Command(tuple(flags), config_dir, tuple(overrides))


def compose(command: Command, conf: Path) -> Any:
    """The config of a command, of a sweep's first cell; its launcher resolved.

    Raises:
        hydra's errors: the command cannot be right.
    """
    import hydra
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from omegaconf import OmegaConf

    first = []
    for override in OverridesParser.create().parse_overrides(list(command.overrides)):
        line = override.input_line
        if override.is_sweep_override():
            key, value = line.split("=")[0], next(override.sweep_string_iterator())
            line = f"{key}={value}"
        first.append(line)
    if command.config_dir:
        folder = Path(command.config_dir).resolve()
        first.append(f"hydra.searchpath=[file://{conf.parent},file://{folder}]")
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(conf), version_base="1.3"):
        cfg = hydra.compose("config", first, return_hydra_config=True)
        named = {override.split("=")[0] for override in first}
        axes = sweep_axes(cfg)
        if axes:
            first += [f"{k}={v[0]}" for k, v in axes.items() if k not in named]
            cfg = hydra.compose("config", first, return_hydra_config=True)
    GlobalHydra.instance().clear()
    OmegaConf.to_container(cfg.hydra.launcher, resolve=True)
    return cfg


def sweep_axes(cfg: Any) -> dict[str, list[str]]:
    """What the sweep of a config runs over; nothing where one run is asked for."""
    if not str(cfg.hydra.mode).endswith("MULTIRUN"):
        return {}
    return {key: str(values).split(",") for key, values in cfg.hydra.sweeper.params.items()}


def shrunken(command: Command, cfg: Any, clip: str | None = None) -> list[str]:
    """Arguments that do the same in seconds.

    Args:
        cfg: what the command composes to.
        clip: in place of the command's.
    """
    given = list(command.overrides)
    if clip is not None:
        given = [f"clip={clip}" if one.startswith("clip=") else one for one in given]
        given = [one for one in given if not one.startswith("clip.")]
    small = dict(SMALL)
    for group in ("dataset", "train_dataset"):
        if "Scenes" in cfg[group].get("_target_", ""):
            small[f"++{group}.size"] = str(SCENES)
    if not any(one.startswith("logger") for one in given):
        small["logger"] = "none"
    named = {one.split("=")[0] for one in given}
    for key, values in sweep_axes(cfg).items():
        if key not in named and len(values) > 1:
            small[key] = ",".join(values[:CELLS])
    flags = [*command.flags]
    if command.config_dir:
        flags += ["--config-dir", command.config_dir]
    return [*flags, *given, *(f"{key}={value}" for key, value in small.items())]

"""sweeps/wandb/*.yaml: every value that W&B could ask for composes."""

from typing import Any

import pytest
import yaml
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from clipsae.tasks.dashboard import CURVES
from run import ROOT

FILES = sorted((ROOT / "sweeps" / "wandb").glob("*.yaml"))


def choices(parameter: dict[str, Any]) -> list[Any]:
    """What a parameter may be: all its values, or both ends of its range."""
    if "value" in parameter:
        return [parameter["value"]]
    return parameter.get("values") or [parameter["min"], parameter["max"]]


def runs(sweep: dict[str, Any]) -> list[list[str]]:
    """Overrides as W&B's agent writes them, of a few runs with every end of a range."""
    from wandb.sdk.launch.sweeps.utils import create_sweep_command_args

    names = list(sweep["parameters"])
    values = [choices(parameter) for parameter in sweep["parameters"].values()]
    found = []
    for i in (0, 1, -1):
        args = {n: {"value": v[i % len(v)]} for n, v in zip(names, values, strict=True)}
        found.append(create_sweep_command_args({"args": args})["args_no_hyphens"])
    return found


def test_there_are_some():
    assert {file.stem for file in FILES} == {"benchmark", "demo", "k", "sparsemax"}


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_value_composes_to_what_was_asked(file):
    sweep = yaml.safe_load(file.read_text())
    assert (ROOT / sweep["program"]).is_file()
    assert sweep["command"][-1] == "${args_no_hyphens}"
    assert sweep["metric"]["name"].startswith("topn/on_") or sweep["metric"]["name"] in CURVES
    for group in {"model", "dataset"} & sweep["parameters"].keys():
        known = {path.stem for path in (ROOT / "conf" / group).glob("*.yaml")}
        assert known >= set(choices(sweep["parameters"][group]))
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        for overrides in runs(sweep):
            cfg = compose("config", overrides)
            for override in overrides:
                name, value = override.split("=")
                node = OmegaConf.select(cfg, name)
                found = node.name if name in ("model", "dataset") else node
                if name == "clip":
                    assert node.pretrained == "openai"
                else:
                    assert found == yaml.safe_load(value)


def test_the_grids_are_those_of_hydras_sweeps():
    for name in ("demo", "benchmark"):
        ours = OmegaConf.load(ROOT / "sweeps" / f"{name}.yaml").hydra.sweeper.params
        theirs = yaml.safe_load((ROOT / "sweeps" / "wandb" / f"{name}.yaml").read_text())
        for key in ("model", "dataset"):
            assert ours[key].split(",") == theirs["parameters"][key]["values"]

"""`task=dashboard`: a W&B workspace as code, for what `training.logging` logs."""

import json
import logging
import os
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf

from clipsae.errors import ConfigError
from clipsae.evaluation.numbers import SETTINGS

if TYPE_CHECKING:
    from wandb_workspaces.workspaces import Workspace

log = logging.getLogger(__name__)

CURVES = {
    "train/loss": "loss",
    "val/fvu": "fraction of variance unexplained, held out",
    "val/l0": "active latents per token (L0), held out",
    "val/dead_fraction": "dead latents",
    "train/tokens_per_second": "tokens per second",
    "train/learning_rate": "learning rate",
}


def run(cfg: DictConfig) -> None:
    """Write the workspace's JSON; save it in W&B where that is possible.

    Raises:
        ConfigError: the extra is not installed.
    """
    task = cfg.task
    datasets = list(task.datasets or swept_datasets() or [cfg.dataset.name])
    try:
        made = workspace(task.entity or "entity", task.project, task.sweep, datasets, list(task.ns))
    except ImportError as error:
        raise ConfigError(
            f"task=dashboard needs wandb-workspaces ({error}): pip install -e '.[dashboard]'"
        ) from error
    file = Path(task.file)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(as_json(made) + "\n")
    log.info("the workspace, as it is sent to W&B, is written to %s", file)
    save(made, task.entity)


def swept_datasets() -> list[str]:
    """The datasets that the chosen sweep runs over; none without a sweep."""
    given = (HydraConfig.get().sweeper.get("params") or {}).get("dataset")
    if given is None:
        return []
    loader = GlobalHydra.instance().config_loader()
    parser = OverridesParser.create(config_loader=loader)
    (override,) = parser.parse_overrides([f"dataset={given}"])
    choices = list(override.sweep_iterator()) if override.is_sweep_override() else [given]
    return [name_of("dataset", choice) for choice in choices]


def name_of(group: str, choice: Any) -> str:
    """What a choice of a config group calls itself."""
    file = Path(os.environ["CLIPSAE_ROOT"], "conf", group, f"{choice}.yaml")
    return str(OmegaConf.load(file).get("name", choice) if file.is_file() else choice)


def save(made: "Workspace", entity: str | None) -> None:
    """Save a workspace in W&B; where that cannot be, say why."""
    from clipsae.training.logging import logged_in

    lacking = [] if logged_in() else ["log in by `wandb login`"]
    lacking += ["name the user or team by logger.entity="] if entity is None else []
    if lacking:
        log.info(
            "not saved in W&B, which does not read the file: %s, and give the same command again "
            "(on any machine, since it needs none of the results)",
            " and ".join(lacking),
        )
        return
    try:
        made.save()
    except Exception as error:  # the server's, the network's, the library's own
        log.warning("not saved in W&B: %s", error)
    else:
        log.info("saved: %s", made.url)


def workspace(
    entity: str, project: str, sweep: str, datasets: list[str], ns: list[int]
) -> "Workspace":
    """The workspace of one sweep's runs.

    Args:
        entity, project: where the runs are.
        sweep: their group.
        datasets: a panel each.
        ns: latents kept, of which scatter plots show the middle one.

    Raises:
        ImportError: wandb-workspaces is not installed.
    """
    import wandb_workspaces.reports.v2 as wr
    import wandb_workspaces.workspaces as ws

    middle = sorted(ns)[len(ns) // 2]
    accuracy = [
        ws.Section(
            name=f"Accuracy over n: {meaning}",
            is_open=setting == "on",
            panels=[
                wr.LinePlot(
                    title=dataset,
                    x="topn/n",
                    y=[f"topn/{dataset}/{setting}"],
                    log_x=True,
                    title_x="n",
                    title_y="macro accuracy, %",
                )
                for dataset in datasets
            ],
        )
        for setting, meaning in SETTINGS.items()
        if setting != "no_sae"
    ]
    scatter = [
        ws.Section(
            name="k",
            panels=[
                wr.ScatterPlot(
                    title=title, x=wr.Config("model.k"), y=wr.SummaryMetric(y), log_x=True
                )
                for y, title in (
                    (f"topn/on_{middle}", f"accuracy with {middle} latents"),
                    ("val/fvu", "variance unexplained"),
                    ("measure/monosemanticity_mean", "monosemanticity"),
                )
            ],
        ),
        ws.Section(
            name="Sparsity against fidelity",
            is_open=True,
            panels=[
                wr.ScatterPlot(
                    title=title, x=wr.SummaryMetric("val/l0"), y=wr.SummaryMetric(y), log_x=True
                )
                for y, title in (
                    ("val/fvu", "variance unexplained over L0"),
                    ("measure/cknna", "CKNNA over L0"),
                )
            ],
        ),
    ]
    training = ws.Section(
        name="Training",
        panels=[
            wr.LinePlot(title=title, x="trainer/global_step", y=[name])
            for name, title in CURVES.items()
        ],
    )
    return ws.Workspace(
        entity=entity,
        project=project,
        name=f"clipsae: {sweep}",
        sections=[*accuracy, *scatter, training],
        runset_settings=ws.RunsetSettings(
            filters=[ws.Metric("Group") == sweep],
            # Failures: their state and last words, in the table of the runs.
            pinned_columns=["run:displayName", "run:state", "summary:failure"],
        ),
    )


def as_json(made: "Workspace") -> str:
    """What would be sent to W&B, with numbers for the ids that are drawn at random each time."""
    content = json.loads(made._to_model().model_dump_json(by_alias=True))
    return json.dumps(_numbered(content, count(1)), indent=2)


def _numbered(node: Any, ids: Iterator[int]) -> Any:
    if isinstance(node, list):
        return [_numbered(value, ids) for value in node]
    if not isinstance(node, dict):
        return node
    return {
        key: str(next(ids)) if key == "__id__" and value else _numbered(value, ids)
        for key, value in node.items()
    }

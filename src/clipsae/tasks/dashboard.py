"""`task=dashboard`: a W&B workspace as code, for what `training.logging` logs."""

import itertools
import json
import logging
import os
from collections.abc import Sequence
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
OVER_K = {
    "topn/on_{n}": "accuracy with {n} latents",
    "val/fvu": "variance unexplained",
    "measure/monosemanticity_mean": "monosemanticity",
}
OVER_L0 = {"val/fvu": "variance unexplained over L0", "measure/cknna": "CKNNA over L0"}


def run(cfg: DictConfig) -> None:
    """Write the workspace's JSON; save it in W&B where that is possible.

    Raises:
        ConfigError: the extra is not installed.
    """
    task = cfg.task
    datasets = list(task.datasets or swept_datasets() or [cfg.dataset.name])
    try:
        board = workspace(task.entity or "entity", task.project, task.sweep, datasets, task.ns)
    except ImportError as error:
        raise ConfigError(
            f"task=dashboard needs wandb-workspaces ({error}): pip install -e '.[dashboard]'"
        ) from error
    file = Path(task.file)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(as_json(board) + "\n")
    log.info("the workspace sent to W&B is written to %s", file)
    save(board, task.entity)


def swept_datasets() -> list[str]:
    """The datasets that the chosen sweep runs over; none without a sweep."""
    given = (HydraConfig.get().sweeper.get("params") or {}).get("dataset")
    if given is None:
        return []
    parser = OverridesParser.create(config_loader=GlobalHydra.instance().config_loader())
    (override,) = parser.parse_overrides([f"dataset={given}"])
    choices = list(override.sweep_iterator()) if override.is_sweep_override() else [given]
    folder = Path(os.environ["CLIPSAE_ROOT"], "conf", "dataset")
    files = {choice: folder / f"{choice}.yaml" for choice in choices}
    return [
        str(OmegaConf.load(file).get("name", choice) if file.is_file() else choice)
        for choice, file in files.items()
    ]


def save(board: "Workspace", entity: str | None) -> None:
    """Save a workspace in W&B; where that is not possible, say why."""
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
        board.save()
    except Exception as error:  # the server's, the network's, the library's own
        log.warning("not saved in W&B: %s", error)
    else:
        log.info("saved: %s", board.url)


def workspace(
    entity: str, project: str, sweep: str, datasets: Sequence[str], ns: Sequence[int]
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

    def over_n(setting: str) -> list[Any]:
        axes: Any = {"x": "topn/n", "log_x": True, "title_x": "n", "title_y": "macro accuracy, %"}
        return [wr.LinePlot(title=d, y=[f"topn/{d}/{setting}"], **axes) for d in datasets]

    def scatter(x: Any, titles: dict[str, str]) -> list[Any]:
        n = sorted(ns)[len(ns) // 2]
        return [
            wr.ScatterPlot(title=t.format(n=n), x=x, y=wr.SummaryMetric(y.format(n=n)), log_x=True)
            for y, t in titles.items()
        ]

    steps = "trainer/global_step"
    panels = {
        f"Accuracy over n: {meaning}": over_n(setting)
        for setting, meaning in SETTINGS.items()
        if setting != "no_sae"
    }
    panels["k"] = scatter(wr.Config("model.k"), OVER_K)
    panels["Sparsity against fidelity"] = scatter(wr.SummaryMetric("val/l0"), OVER_L0)
    panels["Training"] = [wr.LinePlot(title=t, x=steps, y=[name]) for name, t in CURVES.items()]
    is_open = (f"Accuracy over n: {SETTINGS['on']}", "Sparsity against fidelity")
    return ws.Workspace(
        entity=entity,
        project=project,
        name=f"clipsae: {sweep}",
        sections=[
            ws.Section(name=name, panels=found, is_open=name in is_open)
            for name, found in panels.items()
        ],
        runset_settings=ws.RunsetSettings(
            filters=[ws.Metric("Group") == sweep],
            # Failures: their state and last words, in the table of the runs.
            pinned_columns=["run:displayName", "run:state", "summary:failure"],
        ),
    )


def as_json(board: "Workspace") -> str:
    """What would be sent to W&B, with numbers for the ids that are drawn at random each time."""
    ids = itertools.count(1)

    def numbered(node: dict[str, Any]) -> dict[str, Any]:
        return node | ({"__id__": str(next(ids))} if node.get("__id__") else {})

    content = board._to_model().model_dump_json(by_alias=True)
    return json.dumps(json.loads(content, object_hook=numbered), indent=2)

"""Cells without a figure, and the command that fills them."""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from clipsae.report.collect import NO_K
from clipsae.report.names import column_title
from clipsae.report.published import ABLATED_ON, ablation_parts, metrics
from clipsae.report.select import Selection
from clipsae.report.tables import MEASURED_ON, PAPER_COLUMNS, accuracy_columns
from clipsae.report.variants import Line

ALL = "all"


@dataclass(frozen=True)
class Missing:
    """One model on one dataset that lacks figures.

    Attributes:
        model, dataset: which; several datasets joined by ", ".
        what: the columns that lack, or `ALL`.
        command: the command line that fills them.
    """

    model: str
    dataset: str
    what: str
    command: str


@dataclass(frozen=True)
class Commands:
    """How to ask for a result.

    Attributes:
        common: overrides that every command takes, such as "clip=vit_b_16".
        seed: of results that there is no seed of.
        datasets: overrides that choose a dataset, where it is not `dataset=<name>`.
    """

    common: Sequence[str]
    seed: int = 0
    datasets: Mapping[str, Sequence[str]] = field(default_factory=dict)

    def line(
        self,
        selection: Selection,
        line: Line,
        dataset: str,
        seed: str | None = None,
        *,
        multirun: bool = False,
    ) -> str:
        """The command line of one cell, or of several: seeds and datasets joined by commas."""
        k = selection.k.get(line, NO_K)
        # A model without results is to be like most results of the others.
        like = line if line.variant or len(selection.of(line)) else selection.usual(line.model)
        given = {word.partition("=")[0] for word in self.common}
        words = ["python", "run.py", *["-m"] * multirun, f"model={line.model}"]
        words += [f"model.k={k}"] * (k != NO_K)
        words += self.datasets.get(dataset, [f"dataset={dataset}"])
        words += self.common
        words += [word for word in like.overrides if word.partition("=")[0] not in given]
        return shlex.join([*words, f"seed={self.seed if seed is None else seed}"])


def missing_cells(selection: Selection, commands: Commands) -> list[Missing]:
    """Expected cells of the accuracy tables, the ablation and Tables 5 and 6 without a figure.

    Expected are `selection.expected` on `selection.datasets`; with ImageNet, the ablation's two
    mixed models and the measurements of the models in Tables 5 and 6 on it. Of a model with several
    lines the first is to be filled.
    """
    columns = {dataset: accuracy_columns(selection, [dataset]) for dataset in selection.datasets}
    expected = [(m, dataset, columns[dataset]) for dataset in columns for m in selection.expected]
    if ABLATED_ON in selection.eleven and selection.wanted.models is None:
        mixed = [model for model in ablation_parts() if model not in selection.expected]
        expected += [(model, ABLATED_ON, list(PAPER_COLUMNS[1:5])) for model in mixed]
    measured = selection.metrics[selection.metrics.dataset == MEASURED_ON]
    found = []
    for model, dataset, keys in expected:
        line = selection.main(model)
        cells = selection.of(line, dataset)
        has = set(cells.metric[cells.value.notna()])
        lacking = [key for key in keys if key not in has] if has else [ALL]
        if has and dataset == MEASURED_ON and model in selection.expected:
            there = set(selection.rows(measured, line).metric)
            lacking += [metric for m, metric in metrics() if m == model and metric not in there]
        if lacking:
            what = ", ".join(column_title(key, selection.wanted.latents) for key in lacking)
            found.append(Missing(model, dataset, what, commands.line(selection, line, dataset)))
    return found


def fewer_seeds(selection: Selection, commands: Commands) -> list[Missing]:
    """Cells that are there, but not of every seed that the model's other cells have: an entry a
    model and set of seeds, its datasets in one multirun."""
    found = []
    for model in selection.models:
        line = selection.main(model)
        runs = selection.rows(selection.runs, line)
        lacking: dict[tuple[str, tuple[int, ...]], list[str]] = {}
        for dataset in selection.datasets:
            has = set(runs.seed[runs.dataset == dataset])
            absent = tuple(sorted(set(runs.seed) - has))
            if has and absent:
                alone = dataset if dataset in commands.datasets else ""
                lacking.setdefault((alone, absent), []).append(dataset)
        for (_, seeds), datasets in lacking.items():
            listed = ",".join(map(str, seeds))
            command = commands.line(selection, line, ",".join(datasets), listed, multirun=True)
            found.append(Missing(model, ", ".join(datasets), f"seed {listed}", command))
    return found

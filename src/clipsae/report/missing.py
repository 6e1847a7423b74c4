"""Cells without a figure, and the command that fills them."""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from clipsae.report.accuracy_tables import PAPER_COLUMNS, accuracy_columns
from clipsae.report.collect import NO_K
from clipsae.report.metric_tables import MEASURED_ON
from clipsae.report.names import column_title
from clipsae.report.published import ABLATED_ON, ablation, ablation_parts, metrics
from clipsae.report.select import Selection
from clipsae.report.variants import Line

ALL = "all"


@dataclass(frozen=True)
class Missing:
    """One model on one dataset that lacks figures.

    Attributes:
        model: which.
        dataset: which; several joined by ", ".
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
        wanted = line if line.variant or len(selection.of(line)) else selection.usual(line.model)
        given = {word.partition("=")[0] for word in self.common}
        words = [
            "python",
            "run.py",
            *(["-m"] if multirun else []),
            f"model={line.model}",
            *([f"model.k={k}"] if k != NO_K else []),
            *self.datasets.get(dataset, [f"dataset={dataset}"]),
            *self.common,
            *(word for word in wanted.overrides if word.partition("=")[0] not in given),
            f"seed={self.seed if seed is None else seed}",
        ]
        return shlex.join(words)


def missing_cells(selection: Selection, commands: Commands) -> list[Missing]:
    """Expected cells of the accuracy tables, the ablation and Tables 5 and 6 without a figure.

    Expected are `selection.expected` on `selection.datasets`; with ImageNet, the ablation's two
    mixed models and the measurements of the models in Tables 5 and 6 on it. Of a model with several
    lines the first is to be filled.
    """
    gaps: dict[tuple[str, str], list[str]] = {}
    for dataset in selection.datasets:
        columns = accuracy_columns(selection, [dataset])
        for model in selection.expected:
            _note(gaps, selection, model, dataset, columns)
    if ABLATED_ON in selection.eleven and selection.wanted.models is None:
        for model in ablation_parts():
            if model not in selection.expected:
                columns = sorted({c for m, c in ablation() if m == model}, key=_paper_order)
                _note(gaps, selection, model, ABLATED_ON, columns)
    if MEASURED_ON in selection.eleven:
        of = selection.metrics[selection.metrics.dataset == MEASURED_ON]
        for model in selection.expected:
            wanted = [metric for m, metric in metrics() if m == model]
            has = set(selection.rows(of, selection.main(model)).metric)
            lacking = [metric for metric in wanted if metric not in has]
            if lacking and gaps.get((model, MEASURED_ON)) != [ALL]:
                gaps.setdefault((model, MEASURED_ON), []).extend(lacking)
    return [
        Missing(
            model,
            dataset,
            ", ".join(column_title(c, selection.wanted.latents) for c in what),
            commands.line(selection, selection.main(model), dataset),
        )
        for (model, dataset), what in gaps.items()
    ]


def fewer_seeds(selection: Selection, commands: Commands) -> list[Missing]:
    """Cells that are there, but not of every seed that the model's other cells have: an entry a
    model and set of seeds, its datasets in one multirun."""
    runs = selection.runs
    found = []
    for model in selection.models:
        line = selection.main(model)
        of = selection.rows(runs, line)
        lacking: dict[tuple[str, tuple[int, ...]], list[str]] = {}
        for dataset in selection.datasets:
            has = set(of.seed[of.dataset == dataset])
            absent = tuple(sorted(set(of.seed) - has))
            if has and absent:
                alone = dataset if dataset in commands.datasets else ""
                lacking.setdefault((alone, absent), []).append(dataset)
        for (_, seeds), datasets in lacking.items():
            listed = ",".join(str(seed) for seed in seeds)
            found.append(
                Missing(
                    model,
                    ", ".join(datasets),
                    f"seed {listed}",
                    commands.line(selection, line, ",".join(datasets), listed, multirun=True),
                )
            )
    return found


def _note(
    gaps: dict[tuple[str, str], list[str]],
    selection: Selection,
    model: str,
    dataset: str,
    columns: Sequence[str],
) -> None:
    of = selection.of(selection.main(model), dataset)
    has = set(of.column[of.accuracy.notna()])
    lacking = [column for column in columns if column not in has]
    if not has:
        gaps[model, dataset] = [ALL]
    elif lacking:
        gaps[model, dataset] = lacking


def _paper_order(column: str) -> int:
    return PAPER_COLUMNS.index(column)

"""Cells without a figure, and the command that fills them."""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from clipsae.report import published
from clipsae.report.collect import NO_K
from clipsae.report.names import column_title
from clipsae.report.select import Selection
from clipsae.report.settings import NOT_LEARNED, Line
from clipsae.report.tables import MEASURED_ON, PAPER_COLUMNS, accuracy_columns

ALL = "all"


@dataclass(frozen=True)
class Missing:
    """One model on one dataset that lacks figures."""

    model: str
    dataset: str  # several joined by ", "
    what: str  # the columns that lack, or `ALL`
    command: str  # the command line that fills them


@dataclass(frozen=True)
class Commands:
    """How to ask for a result."""

    common: Sequence[str]  # overrides that every command takes, such as "clip=vit_b_16"
    seed: int = 0  # of results that there is no seed of
    # Overrides that choose a dataset, where it is not `dataset=<name>`.
    datasets: Mapping[str, Sequence[str]] = field(default_factory=dict)

    def line(
        self, selection: Selection, line: Line, datasets: Sequence[str], seeds: Sequence[int] = ()
    ) -> str:
        """The command line of one cell, or of several: a multirun over seeds and datasets."""
        k = selection.k.get(line, NO_K)
        # A model without results is to be like most results of the others.
        like = line if line.variant or len(selection.of(line)) else selection.usual(line.model)
        given = {word.partition("=")[0] for word in self.common}
        words = ["python", "run.py", *["-m"] * bool(seeds), f"model={line.model}"]
        words += [f"model.k={k}"] * (k != NO_K)
        words += self.datasets.get(datasets[0], [f"dataset={','.join(datasets)}"])
        words += self.common
        words += [word for word in like.overrides if word.partition("=")[0] not in given]
        return shlex.join([*words, f"seed={','.join(map(str, seeds or [self.seed]))}"])


def missing_cells(selection: Selection, commands: Commands) -> list[Missing]:
    """Expected cells of the accuracy tables, the ablation and Tables 5 and 6 without a figure.

    Expected are `selection.expected` on `selection.classified`; with ImageNet, the ablation's two
    mixed models and the measurements of the models in Tables 5 and 6 on it. Of a model with several
    lines the first is to be filled, unless one as much like the usual settings has the figure.
    """
    expected = [
        (model, dataset, accuracy_columns(selection, [dataset]))
        for dataset in selection.classified
        for model in selection.expected
    ]
    if published.ABLATED_ON in selection.eleven and selection.wanted.models is None:
        mixed = [m for m in published.ablation_parts() if m not in selection.expected]
        expected += [(m, published.ABLATED_ON, list(PAPER_COLUMNS[1:5])) for m in mixed]
    found = []
    for model, dataset, keys in expected:
        lines = selection.alike(model)
        cells = [selection.of(line, dataset).dropna(subset="value") for line in lines]
        has = {metric for rows in cells for metric in rows.metric}
        lacking = [key for key in keys if key not in has] if has else [ALL]
        if has and dataset == MEASURED_ON and model in selection.expected:
            figures = selection.metrics[selection.metrics.dataset == dataset]
            measured = {metric for line in lines for metric in selection.rows(figures, line).metric}
            lacking += [n for m, n in published.metrics() if m == model and n not in measured]
        if lacking:
            what = ", ".join(column_title(key, selection.wanted.latents) for key in lacking)
            command = commands.line(selection, lines[0], [dataset])
            found.append(Missing(model, dataset, what, command))
    return found


def no_baselines(selection: Selection, commands: Commands) -> list[str]:
    """A line with the command that makes them, where no SAE is there that has not learned."""
    if any(line.learned in NOT_LEARNED for line in selection.baselines):
        return []
    command = shlex.join(["python", "run.py", "sweeps=baselines", *commands.common])
    return [
        "There is no SAE that has not learned to compare with, so no table says how much of the "
        f"gap training closes: {command} makes some."
    ]


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
            what = f"seed {','.join(map(str, seeds))}"
            command = commands.line(selection, line, datasets, seeds)
            found.append(Missing(model, ", ".join(datasets), what, command))
    return found

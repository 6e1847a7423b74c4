"""Which finished results fill a cell, and the mean over seeds in it."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd

from clipsae.report.collect import NO_K, Collected
from clipsae.report.names import ELEVEN_NAMES, SIX, WITH_K
from clipsae.report.published import ablation_parts
from clipsae.report.variants import Line, set_apart, unlike

LINE = ["model", "common", "own"]
ENCODER = ["image_encoder", "pooling"]


@dataclass(frozen=True)
class Wanted:
    """What a report is about.

    Attributes:
        clip, weights, layer: of the CLIP, as `conf/clip` names them (weights: `str(pretrained)`).
        protocol: "paper" or "heldout".
        latents: M.
        models, datasets: rows and tables; None: the six variants and others found; the eleven
            datasets if any of them has a result, and others found.
        k: of TopK and BatchTopK in the tables; None: the k with results on most datasets.
        settings: what all results must have, such as {"trainer.max_steps": "600"}; those that a
            result does not have at all are not asked of it.
        usual: settings of the composed config: of a model's unlike results those with these come
            first, and are the ones that are missing.
    """

    clip: str
    weights: str
    layer: int
    protocol: str
    latents: int
    models: tuple[str, ...] | None = None
    datasets: tuple[str, ...] | None = None
    k: int | None = None
    settings: Mapping[str, str] = field(default_factory=dict)
    usual: Mapping[str, str] = field(default_factory=dict)

    @property
    def weights_title(self) -> str:
        """The weights without the folder they lie in."""
        return Path(self.weights).name


@dataclass(frozen=True)
class Selection:
    """The results that the report shows.

    Attributes:
        wanted: what it is about.
        cells: accuracies, a row a (model, common, own, dataset, k, metric): value (mean over
            seeds), std (over seeds, with n - 1; NaN for one), seeds (how many), images, classes,
            competing. For `common` and `own` see `Line`.
        runs: the same before the mean over seeds, with `seed` and `folder`.
        metrics: like `cells`, also by image_encoder and pooling.
        lines: rows of the tables, in order: models, and of each first the line that is most like
            `wanted.usual`, of several such that with most results.
        ablated: rows of the ablation's tables.
        expected: models that should have results.
        eleven, others: datasets of the tables, in order.
        k: line -> its k in the tables, `NO_K` for those without.
        differences: a sentence for each setting that differs between results.
        folders: names of the results that are used.
        superseded: how many fitting results a newer one replaces.
        unfitting: how many results are of another CLIP, protocol or M.
    """

    wanted: Wanted
    cells: pd.DataFrame
    runs: pd.DataFrame
    metrics: pd.DataFrame
    lines: tuple[Line, ...]
    ablated: tuple[Line, ...]
    expected: tuple[str, ...]
    eleven: tuple[str, ...]
    others: tuple[str, ...]
    k: dict[Line, int]
    differences: tuple[str, ...]
    folders: tuple[str, ...]
    superseded: int
    unfitting: int

    @property
    def datasets(self) -> tuple[str, ...]:
        return self.eleven + self.others

    @property
    def models(self) -> tuple[str, ...]:
        """Of the lines."""
        return tuple(dict.fromkeys(line.model for line in self.lines))

    @property
    def groups(self) -> list[tuple[str, tuple[Line, ...]]]:
        """Lines with results that may be compared with each other, by what they have in common."""
        labels = dict.fromkeys(line.common for line in self.lines if len(self.of(line)))
        return [(label, tuple(x for x in self.lines if x.common == label)) for label in labels]

    def usual(self, model: str) -> Line:
        """A line of a model without results: with the common settings most like `wanted.usual`,
        of several such those of most results."""
        most = self.runs.groupby("common", sort=False).folder.nunique()
        order = {c: (unlike(str(c), self.wanted.usual), -n) for c, n in most.items()}
        return Line(model, str(min(order, key=order.__getitem__)) if order else "")

    def main(self, model: str) -> Line:
        """A model's first line; one without results where it has none."""
        lines = (line for line in (*self.lines, *self.ablated) if line.model == model)
        return next(lines, Line(model))

    def alike(self, line: Line) -> tuple[Line, ...]:
        """The model's lines that are as much like `wanted.usual` as this one, with it."""
        as_much = unlike(line.common, self.wanted.usual)
        others = (x for x in (*self.lines, *self.ablated) if x.model == line.model)
        return (
            line,
            *(x for x in others if x != line and unlike(x.common, self.wanted.usual) == as_much),
        )

    def of(self, line: Line, dataset: str | None = None) -> pd.DataFrame:
        """The cells of a line with the tables' k, and of one dataset."""
        return self._by_line.get((line, dataset), self.cells[:0])

    @cached_property
    def _by_line(self) -> dict[tuple[Line, str | None], pd.DataFrame]:
        found: dict[tuple[Line, str | None], pd.DataFrame] = {}
        for line in {*self.lines, *self.ablated}:
            cells = found[line, None] = self.rows(self.cells, line)
            found |= {(line, str(d)): part for d, part in cells.groupby("dataset", sort=False)}
        return found

    def rows(self, frame: pd.DataFrame, line: Line) -> pd.DataFrame:
        """Those of a frame that are a line's, with the tables' k."""
        frame = of_line(frame, line)
        return frame[frame.k == self.k.get(line, NO_K)]

    def shown(self, frame: pd.DataFrame) -> tuple[Line, ...]:
        """The lines of a table on rows of `cells` or `metrics`: those with a figure in it; of a
        model without any its first."""
        filled = {line for line in self.lines if len(self.rows(frame, line))}
        models = {line.model for line in filled}
        return tuple(
            line
            for line in self.lines
            if line in filled or (line.model not in models and line == self.main(line.model))
        )


def of_line(frame: pd.DataFrame, line: Line) -> pd.DataFrame:
    return frame[frame.model.eq(line.model) & frame.common.eq(line.common) & frame.own.eq(line.own)]


def select(found: Collected, wanted: Wanted) -> Selection:
    """Choose among what was collected.

    Results that differ in a setting are lines of their own (`variants.py`). Of several results with
    the same settings (one has more values of n, say) the newest counts, figure by figure.
    """
    # Image encoder and pooling set MonoSemanticity alone apart, which has tables by them.
    idle = ~found.measurements.metric.astype(str).str.startswith("monosemanticity_")
    encoders = {name: found.measurements[name].mask(idle, "") for name in ENCODER}
    frames = [found.results, found.measurements.assign(**encoders)]
    fitting = [_of_models(_fitting(frame, wanted), wanted) for frame in frames]
    (results, measured), differences = set_apart(fitting)
    cell = [*LINE, "dataset", "k", "metric"]
    runs = _newest(results, [*cell, "seed"])
    metrics = _newest(measured, [*cell, "seed", *ENCODER])

    used = {*runs.folder, *metrics.folder}
    unfitting = {
        folder
        for frame in (found.results, found.measurements)
        for folder in set(frame.folder) - set(_fitting(frame, wanted).folder)
    }
    there = {*runs.model, *metrics.model} - set(SIX) - set(ablation_parts())
    models = wanted.models or (*SIX, *sorted(there))
    lines = _lines(models, wanted.usual, runs, metrics)
    ablated = _lines(ablation_parts(), wanted.usual, runs, metrics)
    eleven, others = _datasets(wanted, {*runs.dataset, *metrics.dataset})
    return Selection(
        wanted=wanted,
        cells=_over_seeds(runs, cell),
        runs=runs,
        metrics=_over_seeds(metrics, [*cell, *ENCODER]),
        lines=lines,
        ablated=ablated,
        expected=wanted.models or SIX,
        eleven=eleven,
        others=others,
        k={line: _table_k(line, wanted, runs, metrics) for line in {*lines, *ablated}},
        differences=tuple(differences),
        folders=tuple(sorted(used)),
        superseded=len({*results.folder, *fitting[1].folder} - used),
        unfitting=len(unfitting),
    )


def _fitting(rows: pd.DataFrame, wanted: Wanted) -> pd.DataFrame:
    """Those of the wanted CLIP, protocol, M and settings."""
    names = ("clip", "weights", "layer", "latents", "protocol")
    keep = [rows[name].eq(getattr(wanted, name)) for name in names if name in rows]
    if wanted.settings:
        asked = wanted.settings.items()
        has = [dict(settings) for settings in rows.settings]
        fits = [all(s.get(name, value) == value for name, value in asked) for s in has]
        keep.append(pd.Series(fits, index=rows.index, dtype=bool))
    return rows[np.logical_and.reduce(keep)]


def _of_models(rows: pd.DataFrame, wanted: Wanted) -> pd.DataFrame:
    """Of the wanted models and datasets: others set nothing apart."""
    if wanted.models is not None:
        rows = rows[rows.model.isin(wanted.models)]
    return rows if wanted.datasets is None else rows[rows.dataset.isin(wanted.datasets)]


def _newest(rows: pd.DataFrame, by: list[str]) -> pd.DataFrame:
    """Of each group the newest row."""
    ordered = rows.sort_values(["finished", "folder"], kind="stable")
    return ordered.drop_duplicates(by, keep="last").sort_index()


def _over_seeds(rows: pd.DataFrame, by: list[str]) -> pd.DataFrame:
    """Mean, standard deviation and number over the seeds of each group."""
    kept = [name for name in ("images", "classes", "competing") if name in rows]
    if rows.empty:
        return pd.DataFrame(columns=[*by, "value", "std", "seeds", *kept])
    grouped = rows.groupby(by, sort=False)
    over = grouped.value.agg(value="mean", std="std", seeds="count")
    return over.join(grouped[kept].min() if kept else over[[]]).reset_index()


def _lines(
    models: Iterable[str], usual: Mapping[str, str], *frames: pd.DataFrame
) -> tuple[Line, ...]:
    """The lines of each model: those most like the usual settings first, then those with results
    on most datasets and of most seeds."""
    found = []
    for model in models:
        counts: dict[Line, tuple[int, ...]] = {}
        for rank, frame in enumerate(frames):  # accuracies before metrics
            mine = frame[frame.model == model]
            for (common, own), rows in mine.groupby(["common", "own"], sort=False):
                how_many = (-rows.dataset.nunique(), -rows.folder.nunique())
                count = (unlike(str(common), usual), rank, *how_many)
                counts.setdefault(Line(model, str(common), str(own)), count)
        found += sorted(counts, key=lambda line: (counts[line], line)) or [Line(model)]
    return tuple(found)


def _datasets(wanted: Wanted, found: set[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Those of the eleven, and others."""
    if wanted.datasets is not None:
        eleven = tuple(name for name in ELEVEN_NAMES if name in wanted.datasets)
        return eleven, tuple(name for name in wanted.datasets if name not in ELEVEN_NAMES)
    eleven = ELEVEN_NAMES if found & set(ELEVEN_NAMES) else ()
    return eleven, tuple(sorted(found - set(ELEVEN_NAMES)))


def _table_k(line: Line, wanted: Wanted, *frames: pd.DataFrame) -> int:
    """The k of a line's rows: the wanted one, or that with results on most datasets, of the first
    frame that has any."""
    for rows in frames:
        swept = of_line(rows, line)
        swept = swept[swept.k != NO_K]
        if len(swept):
            filled = swept.groupby("k").dataset.nunique()
            return wanted.k or int(filled[filled == filled.max()].index.min())
    return wanted.k if wanted.k and line.model in WITH_K else NO_K

"""Which finished results fill a cell, and the mean over seeds in it."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd

from clipsae.report.collect import ENCODER, NO_K, Collected
from clipsae.report.names import ELEVEN_NAMES, SIX, WITH_K, model_order, model_title
from clipsae.report.published import ablation_parts
from clipsae.report.settings import FITTED, NOT_LEARNED, TRAINED, UNTRAINED, Line, like, set_apart
from clipsae.rules import where


@dataclass(frozen=True)
class Wanted:
    """What a report is about."""

    clip: str  # this and the next two as `conf/clip` names them
    weights: str  # `str(pretrained)`
    layer: int
    protocol: str  # "paper" or "heldout"
    latents: int
    ranking: str = "frequency"  # or "contrast"
    hook: str = "resid"  # as `conf/clip` names it
    # Rows and tables; None: the six variants, the eleven datasets if any has a result, and others.
    models: tuple[str, ...] | None = None
    datasets: tuple[str, ...] | None = None
    k: int | None = None  # of TopK and BatchTopK; None: the k with results on most datasets
    # What all results must have, such as {"trainer.max_steps": "600"}; settings that a result does
    # not have at all are not asked of it.
    settings: Mapping[str, str] = field(default_factory=dict)
    # Of the composed config: of a model's unlike results those with these come first, and are the
    # ones that are missing.
    usual: Mapping[str, str] = field(default_factory=dict)

    @property
    def weights_title(self) -> str:
        """The weights without the folder they lie in."""
        return Path(self.weights).name

    @property
    def where(self) -> str:
        """Where in the tower the SAEs read."""
        return where(self.layer, self.hook)


@dataclass(frozen=True)
class Selection:
    """The results that the report shows.

    Attributes:
        cells: accuracies, a row a (line, dataset, k, metric): value (mean over seeds), std (over
            seeds, with n - 1; NaN for one), seeds (how many), images, classes, competing, tabled
            (whether k is that of the tables).
        metrics: the same of measured numbers, also by image_encoder and pooling.
        runs: accuracies before the mean over seeds, with seed and folder.
        measured: the same of measured numbers.
        ways: accuracies like `runs` by every protocol and ranking of the same SAEs, on the same
            images.
        lines: rows of the tables, in order: models, and of each first the line that is most like
            `wanted.usual`, of several such that with most results. Their SAEs are trained in full.
        baselines: rows below them: SAEs that are frozen in part, untrained or fitted.
    """

    wanted: Wanted
    cells: pd.DataFrame
    metrics: pd.DataFrame
    runs: pd.DataFrame
    measured: pd.DataFrame
    ways: pd.DataFrame
    lines: tuple[Line, ...]
    baselines: tuple[Line, ...]
    ablated: tuple[Line, ...]  # rows of the ablation's tables
    expected: tuple[str, ...]  # models that should have results
    eleven: tuple[str, ...]  # datasets of the tables, in order
    others: tuple[str, ...]
    k: dict[Line, int]  # in the tables; `NO_K` for those without
    differences: tuple[str, ...]  # a sentence for each setting that differs between results
    folders: tuple[str, ...]  # names of the results that are used
    superseded: int  # fitting results that a newer one replaces
    unfitting: int  # results of another CLIP, protocol or M that no table shows

    @property
    def datasets(self) -> tuple[str, ...]:
        return self.eleven + self.others

    @property
    def classified(self) -> tuple[str, ...]:
        """Datasets whose accuracies are there or lacking: all but those measured alone."""
        alone = set(self.metrics.dataset) - set(self.cells.dataset) - set(self.eleven)
        return tuple(name for name in self.datasets if name not in alone)

    @property
    def models(self) -> tuple[str, ...]:
        """Of the lines."""
        return tuple(dict.fromkeys(line.model for line in self.lines))

    def title(self, line: Line) -> str:
        """A line's model, with its k where it has one, and what sets it apart."""
        k = self.k.get(line, NO_K)
        of_k = f" (k = {k})" if k != NO_K else ""
        return ", ".join(filter(None, (model_title(line.model) + of_k, line.variant)))

    def usual(self, model: str) -> Line:
        """A line of a model without results: with the common settings most like `wanted.usual`,
        of several such those of most results."""
        runs = self.runs[self.runs.learned.eq(TRAINED)]
        lines = {line.common: line for line in runs.line}
        common = runs.line.map(lambda line: line.common)
        most = runs.groupby(common, sort=False).folder.nunique()
        order = {c: (lines[c].unlike, -n) for c, n in most.items()}
        return Line(model, min(order, key=order.__getitem__)) if order else Line(model)

    def of_model(self, model: str) -> list[Line]:
        """A model's lines, the main one first; one without results where it has none."""
        lines = dict.fromkeys((*self.lines, *self.ablated))
        return [line for line in lines if line.model == model] or [Line(model)]

    def main(self, model: str) -> Line:
        """A model's first line."""
        return self.of_model(model)[0]

    def alike(self, model: str) -> list[Line]:
        """Those of a model's lines that are as much like `wanted.usual` as its main one."""
        lines = self.of_model(model)
        return [line for line in lines if line.unlike == lines[0].unlike]

    def of(self, line: Line, dataset: str | None = None) -> pd.DataFrame:
        """The accuracies of a line with the tables' k, and of one dataset."""
        cells = self.cells if dataset is None else self.cells[self.cells.dataset == dataset]
        return self.rows(cells, line)

    def rows(self, frame: pd.DataFrame, line: Line) -> pd.DataFrame:
        """Those of a frame that are a line's, with the tables' k."""
        return frame[frame.tabled & frame.line.eq(line)]

    def untrained(self, line: Line) -> Line | None:
        """The untrained SAE of a line's variant, of several that which is most like it."""
        same = [x for x in self.baselines if (x.model, x.learned) == (line.model, UNTRAINED)]
        order = {x: (x.own != line.own, x.common != line.common) for x in same}
        return min(same, key=order.__getitem__, default=None)

    def below(self, frame: pd.DataFrame) -> tuple[Line, ...]:
        """The baselines of a table on rows of `cells` or `metrics`: those with a figure in it."""
        filled = set(frame.line[frame.tabled])
        return tuple(line for line in self.baselines if line in filled)

    def shown(self, frame: pd.DataFrame) -> tuple[Line, ...]:
        """The lines of a table on rows of `cells` or `metrics`: those with a figure in it; of a
        model without any its first."""
        filled = {line for line in frame.line[frame.tabled] if line.learned == TRAINED}
        empty = set(self.models) - {line.model for line in filled}
        filled |= {self.main(model) for model in empty}
        return tuple(line for line in self.lines if line in filled)


def select(found: Collected, wanted: Wanted) -> Selection:
    """Choose among what was collected.

    Results that differ in a setting are lines of their own. Of several results with the same
    settings (one has more values of n, say) the newest counts, figure by figure.
    """
    figures = found.figures
    fits_otherwise = _fits(figures, wanted)
    of_way = figures.protocol.eq(wanted.protocol) & figures.ranking.eq(wanted.ranking)
    fits = fits_otherwise & (of_way | figures.measured.eq(True))
    fitting = figures[fits]
    if wanted.models is not None:  # others set nothing apart
        chosen = fitting.model.isin(wanted.models) | fitting.learned.eq(FITTED)
        fitting = fitting[chosen]
    if wanted.datasets is not None:
        fitting = fitting[fitting.dataset.isin(wanted.datasets)]
    fitting, differences = set_apart(fitting, wanted.usual)
    cell = ["line", "model", "dataset", "k", "metric", "measured", *ENCODER]
    ordered = fitting.sort_values(["finished", "folder"], kind="stable")
    newest = ordered.drop_duplicates([*cell, "seed"], keep="last").sort_index()
    over_seeds = newest.groupby(cell, sort=False)
    cells = over_seeds.value.agg(value="mean", std="std", seeds="count")
    cells = cells.join(over_seeds[["images", "classes", "competing"]].min()).reset_index()

    of_same = like(fitting, figures[fits_otherwise & figures.measured.eq(False)])
    ways = of_same.sort_values(["finished", "folder"], kind="stable")
    way = ["line", "dataset", "k", "metric", "protocol", "ranking", "seed"]
    ways = ways.drop_duplicates(way, keep="last").sort_index()

    trained = newest[newest.learned.eq(TRAINED)]
    ablated = _lines(ablation_parts(), trained)
    baselines = _baselines(newest)
    if wanted.datasets is None:
        evaluated = {*newest.dataset}
        eleven = ELEVEN_NAMES if evaluated & set(ELEVEN_NAMES) else ()
        others = tuple(sorted(evaluated - set(ELEVEN_NAMES)))
    else:
        eleven = tuple(name for name in ELEVEN_NAMES if name in wanted.datasets)
        others = tuple(name for name in wanted.datasets if name not in ELEVEN_NAMES)
    # The paper has the ablation's two in a table of their own alone.
    models = {*trained.model} - set(SIX) - set(ablation_parts() if eleven else ())
    lines = _lines(wanted.models or (*SIX, *sorted(models, key=model_order)), trained)
    k = {line: _table_k(line, wanted, newest) for line in {*lines, *ablated, *baselines}}
    newest, cells, ways = (f.assign(tabled=f.k == f.line.map(k)) for f in (newest, cells, ways))
    used, of_ways = {*newest.folder}, {*ways.folder}
    return Selection(
        wanted=wanted,
        cells=cells[cells.measured.eq(False)],
        metrics=cells[cells.measured.eq(True)],
        runs=newest[newest.measured.eq(False)],
        measured=newest[newest.measured.eq(True)],
        ways=ways,
        lines=lines,
        baselines=baselines,
        ablated=ablated,
        expected=wanted.models or SIX,
        eleven=eleven,
        others=others,
        k=k,
        differences=tuple(differences),
        folders=tuple(sorted(used | of_ways)),
        superseded=len({*fitting.folder, *of_same.folder} - used - of_ways),
        unfitting=len({*figures.folder[~fits]} - {*of_same.folder[~of_way[of_same.index]]}),
    )


def _fits(figures: pd.DataFrame, wanted: Wanted) -> pd.Series:
    """Whether a figure is of the wanted CLIP, M (that of fitted SAEs the data decide) and settings,
    by whichever protocol and ranking."""
    fits = figures.latents.eq(wanted.latents) | figures.learned.eq(FITTED)
    for name in ("clip", "weights", "layer", "hook"):
        fits &= figures[name].eq(getattr(wanted, name))
    if wanted.settings:
        asked = wanted.settings.items()
        known = {settings: dict(settings) for settings in set(figures.settings)}
        good = {s: all(own.get(n, v) == v for n, v in asked) for s, own in known.items()}
        fits &= figures.settings.map(good).astype(bool)
    return fits


def _lines(models: Iterable[str], figures: pd.DataFrame) -> tuple[Line, ...]:
    """The lines of each model: those most like the usual settings first, then those with accuracies
    on most datasets and of most seeds."""
    found: list[Line] = []
    for model in models:
        order = {}
        for line, rows in figures[figures.model == model].groupby("line", sort=False):
            accuracies = rows[rows.measured.eq(False)]
            counted = accuracies if len(accuracies) else rows
            counts = (-counted.dataset.nunique(), -counted.folder.nunique())
            order[line] = (line.unlike, accuracies.empty, *counts, line)
        found += sorted(order, key=order.__getitem__) or [Line(model)]
    return tuple(found)


def _baselines(figures: pd.DataFrame) -> tuple[Line, ...]:
    """Lines that are not trained in full: frozen in part first, then untrained, then fitted."""
    lines = {line for line in figures.line if line.learned != TRAINED}

    def place(line: Line) -> tuple[int, tuple[int, str], Line]:
        kind = NOT_LEARNED.index(line.learned) + 1 if line.learned in NOT_LEARNED else 0
        return kind, model_order(line.model), line

    return tuple(sorted(lines, key=place))


def _table_k(line: Line, wanted: Wanted, figures: pd.DataFrame) -> int:
    """The k of a line's rows: the wanted one, or that with accuracies (without any: numbers) on
    most datasets."""
    swept = figures[figures.line.eq(line) & figures.k.ne(NO_K)]
    if swept.empty:
        return wanted.k if wanted.k and line.model in WITH_K else NO_K
    counted = swept[swept.measured.eq(swept.measured.min())]
    filled = counted.groupby("k").dataset.nunique()
    return wanted.k or int(filled[filled == filled.max()].index.min())

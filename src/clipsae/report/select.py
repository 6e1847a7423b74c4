"""Which finished result fills a cell, and the mean over seeds in it."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from clipsae.report.collect import NO_K, Collected
from clipsae.report.names import ELEVEN_NAMES, SIX, WITH_K
from clipsae.report.published import ablation_parts


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
    """

    clip: str
    weights: str
    layer: int
    protocol: str
    latents: int
    models: tuple[str, ...] | None = None
    datasets: tuple[str, ...] | None = None
    k: int | None = None

    @property
    def weights_title(self) -> str:
        """The weights without the folder they lie in."""
        return Path(self.weights).name


@dataclass(frozen=True)
class Selection:
    """The results that the report shows.

    Attributes:
        wanted: what it is about.
        cells: the chosen results, a row a (model, dataset, k, column): accuracy (mean over
            seeds), std (over seeds, with n - 1; NaN for one), seeds (how many), images, classes.
        runs: the same before the mean over seeds, with `seed` and `folder`.
        metrics: a row a (model, dataset, k, metric, image_encoder, pooling): value, std, seeds;
            metrics that no measurement has come from the evaluations.
        models: rows of the tables, in order.
        expected: those that should have results.
        eleven, others: datasets of the tables, in order.
        k: model -> its k in the tables, `NO_K` for variants without.
        folders: names of the results that are used.
        superseded: how many fitting results a newer one replaces.
        unfitting: how many results are of another CLIP, protocol or M.
    """

    wanted: Wanted
    cells: pd.DataFrame
    runs: pd.DataFrame
    metrics: pd.DataFrame
    models: tuple[str, ...]
    expected: tuple[str, ...]
    eleven: tuple[str, ...]
    others: tuple[str, ...]
    k: dict[str, int]
    folders: tuple[str, ...]
    superseded: int
    unfitting: int

    @property
    def datasets(self) -> tuple[str, ...]:
        return self.eleven + self.others

    def of(self, model: str, dataset: str | None = None) -> pd.DataFrame:
        """The cells of a model with the tables' k, and of one dataset."""
        cells = self.cells[(self.cells.model == model) & (self.cells.k == self.k[model])]
        return cells if dataset is None else cells[cells.dataset == dataset]


def select(found: Collected, wanted: Wanted) -> Selection:
    """Choose among what was collected.

    Of several results of one (model, dataset, k, seed) the newest counts; one that looked at a
    part of the images only (`evaluation.limit_images`) gives way to one of the whole split.
    """
    results = _fitting(found.results, wanted)
    diagnostics = _fitting(found.diagnostics, wanted)
    measured = _without_idle_options(_fitting(found.measurements, wanted))
    cell = ["model", "dataset", "k", "seed"]
    runs = _newest(results, cell, whole=True)
    diagnostics = diagnostics[diagnostics.folder.isin(runs.folder)]
    measured_folders = set(measured.folder)
    # Metric by metric: a later measurement of one metric leaves the others standing.
    measured = _newest(measured, [*cell, "metric", "image_encoder", "pooling"], whole=False)
    metrics = pd.concat([measured, _unmeasured(diagnostics, measured)], ignore_index=True)

    used = sorted({*runs.folder, *measured.folder})
    fitting = {*results.folder, *measured_folders}
    all_folders = {*found.results.folder, *found.measurements.folder}
    models, expected = _models(wanted, runs, metrics)
    eleven, others = _datasets(wanted, runs, metrics)
    return Selection(
        wanted=wanted,
        cells=_over_seeds(runs, ["model", "dataset", "k", "column"], "accuracy"),
        runs=runs,
        metrics=_over_seeds(
            metrics, ["model", "dataset", "k", "metric", "image_encoder", "pooling"], "value"
        ),
        models=models,
        expected=expected,
        eleven=eleven,
        others=others,
        k={name: _table_k(name, wanted, runs, metrics) for name in {*models, *ablation_parts()}},
        folders=tuple(used),
        superseded=len(fitting - set(used)),
        unfitting=len(all_folders - fitting),
    )


def _fitting(rows: pd.DataFrame, wanted: Wanted) -> pd.DataFrame:
    keep = (
        rows["clip"].eq(wanted.clip)
        & rows.weights.eq(wanted.weights)
        & rows.layer.eq(wanted.layer)
        & rows.latents.eq(wanted.latents)
    )
    if "protocol" in rows:
        keep &= rows.protocol.eq(wanted.protocol)
    return rows[keep]


def _newest(rows: pd.DataFrame, by: list[str], *, whole: bool) -> pd.DataFrame:
    """Rows of the best folder of each group: a complete one before others, then the newest.

    Args:
        whole: a folder's rows stay together, `by` names a whole folder.
    """
    if rows.empty:
        return rows
    ordered = rows.sort_values(["complete", "finished", "folder"], kind="stable")
    best = ordered.groupby(by, sort=False).folder.transform("last")
    chosen = ordered[ordered.folder == best]
    unique = [*by, "column"] if whole else by
    return chosen.drop_duplicates(unique, keep="last").sort_index()


def _without_idle_options(measured: pd.DataFrame) -> pd.DataFrame:
    """Image encoder and pooling where they matter: at MonoSemanticity, empty elsewhere."""
    idle = ~measured.metric.astype(str).str.startswith("monosemanticity_")
    options = ["image_encoder", "pooling"]
    return measured.assign(**{name: measured[name].mask(idle, "") for name in options})


def _unmeasured(diagnostics: pd.DataFrame, measured: pd.DataFrame) -> pd.DataFrame:
    """The evaluations' metrics that no measurement of the same cell has."""
    key = ["model", "dataset", "k", "seed", "metric"]
    known = set(map(tuple, measured[key].to_numpy().tolist()))
    unknown = [tuple(row) not in known for row in diagnostics[key].to_numpy().tolist()]
    rows = diagnostics[np.array(unknown, dtype=bool)].assign(image_encoder="", pooling="")
    return rows.drop_duplicates(key)


def _over_seeds(rows: pd.DataFrame, by: list[str], value: str) -> pd.DataFrame:
    """Mean, standard deviation and number over the seeds of each group."""
    kept = [name for name in ("images", "classes") if name in rows]
    if rows.empty:
        return pd.DataFrame(columns=[*by, value, "std", "seeds", *kept])
    grouped = rows.groupby(by, sort=False)
    over = grouped[value].agg(["mean", "std", "count"])
    over.columns = [value, "std", "seeds"]
    return over.join(grouped[kept].min() if kept else over[[]]).reset_index()


def _models(
    wanted: Wanted, runs: pd.DataFrame, metrics: pd.DataFrame
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    if wanted.models is not None:
        return wanted.models, wanted.models
    ablations = set(ablation_parts()) - set(SIX)
    found = {*runs.model, *metrics.model} - set(SIX) - ablations
    return (*SIX, *sorted(found)), SIX


def _datasets(
    wanted: Wanted, runs: pd.DataFrame, metrics: pd.DataFrame
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    found = {*runs.dataset, *metrics.dataset}
    if wanted.datasets is not None:
        eleven = tuple(name for name in ELEVEN_NAMES if name in wanted.datasets)
        return eleven, tuple(name for name in wanted.datasets if name not in ELEVEN_NAMES)
    eleven = ELEVEN_NAMES if found & set(ELEVEN_NAMES) else ()
    return eleven, tuple(sorted(found - set(ELEVEN_NAMES)))


def _table_k(model: str, wanted: Wanted, *frames: pd.DataFrame) -> int:
    """The k of a model's rows: the wanted one, or that with results on most datasets.

    Args:
        frames: where to look for results, one after the other.
    """
    for rows in frames:
        of = rows[(rows.model == model) & (rows.k != NO_K)]
        if not of.empty:
            break
    if of.empty:
        return wanted.k if wanted.k is not None and model in WITH_K else NO_K
    if wanted.k is not None:
        return wanted.k
    filled = of.groupby("k").dataset.nunique()
    return int(filled[filled == filled.max()].index.min())

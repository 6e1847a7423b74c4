"""What the finished cells of a sweep hold, as one tidy frame of figures and one of concepts."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from clipsae.report.collect import read_accuracies, read_concepts, read_numbers, read_origin
from clipsae.report.names import SIX, listed, model_title
from clipsae.report.questions import statistics
from clipsae.report.questions.statistics import Interval
from clipsae.report.settings import FITTED, UNTRAINED, learned_by
from clipsae.store import MARK
from clipsae.store.files import read_json

# Groups of overrides that decide an SAE: the others decide how it is evaluated.
_OF_SAE = ("model", "optimizer", "trainer", "features", "clip", "train_dataset", "precision")
TRAINED = "trained"
_SETTING = ("protocol", "ranking", "share")  # of top-n classification
_COLUMNS = ["recipe", "model", "role", "latents", "k", "seed", "sae", "evaluation", "dataset"]
_COLUMNS += [*_SETTING, "key", "value"]


@dataclass(frozen=True)
class Result:
    """A finished cell of a sweep.

    Attributes:
        overrides: those of the cell.
        sae, evaluation: folders of the finished work.
    """

    overrides: Sequence[str]
    sae: Path
    evaluation: Path


@dataclass(frozen=True)
class Setting:
    """How accuracies were obtained: by the same rule they can be compared."""

    dataset: str
    protocol: str
    ranking: str
    share: float  # of the active codes that count; NaN: by each recipe's evaluation.count_threshold

    @property
    def title(self) -> str:
        """Such as "paper, frequency", or "paper, frequency, 10 %" where a share is counted."""
        share = "" if math.isnan(self.share) else f", {self.share:.0%}".replace("%", " %")
        return f"{self.protocol}, {self.ranking}{share}"


@dataclass(frozen=True)
class Evidence:
    """Everything that the page rests on.

    Attributes:
        figures: a row a figure: recipe (the overrides that decide the SAE but its seed), model,
            role (`TRAINED`, `FITTED`, or what `learned_by` calls the others), latents, k, seed, sae
            and evaluation (names of the folders), dataset, key (a number's, or "on_5", "on_all",
            "no_sae", ...), value. Accuracies (in %) have protocol, ranking and share, numbers have
            none.
        concepts: rows of `concepts.csv` with recipe, model, role, seed and dataset.
        spans: when each finished stage was made, by its folder's name: host, start, end in
            seconds.
        cells: how many the sweep has, those included that are not finished.
        finished: how many of them are; several may be of one evaluation.
        versions: of the packages that made the results.
        limits: on the number of images, of all evaluations; None: all images.
    """

    figures: pd.DataFrame
    concepts: pd.DataFrame
    spans: dict[str, tuple[str, float, float]]
    cells: int
    finished: int = 0
    versions: tuple[str, ...] = ()
    limits: frozenset[int | None] = frozenset()

    @property
    def numbers(self) -> pd.DataFrame:
        """Measured numbers, on the dataset that most SAEs were measured on."""
        rows = self.figures[self.figures.protocol.eq("")]
        if rows.empty:
            return rows
        saes = rows.groupby("dataset", sort=False).sae.nunique()
        return rows[rows.dataset == saes.idxmax()]

    @property
    def accuracies(self) -> pd.DataFrame:
        """Accuracies, in all settings."""
        return self.figures[self.figures.protocol.ne("")]

    def settings(self, share: bool | None = None) -> list[Setting]:
        """Of the accuracies, the one with most SAEs first.

        Args:
            share: only those with (True) or without a share of the codes.
        """
        rows = self.accuracies
        if share is not None:
            rows = rows[rows.share.notna() == share]
        groups = rows.groupby(["dataset", *_SETTING], sort=False, dropna=False).sae.nunique()
        ordered = groups.sort_values(ascending=False, kind="stable").index
        return [Setting(*key) for key in ordered]

    def within(self, setting: Setting) -> pd.DataFrame:
        """The accuracies of a setting."""
        rows = self.accuracies
        same = rows.share.isna() if math.isnan(setting.share) else rows.share.eq(setting.share)
        for name in ("dataset", "protocol", "ranking"):
            same &= rows[name].eq(getattr(setting, name))
        return rows[same]

    def comparable(self) -> pd.DataFrame:
        """Numbers, and the accuracies of the setting with most SAEs."""
        found = self.settings(share=False) or self.settings()
        return pd.concat([self.numbers, *(self.within(setting) for setting in found[:1])])

    def models(self, role: str = TRAINED) -> list[str]:
        """Those with results in a role, the six in the paper's order first."""
        found = set(self.figures.model[self.figures.role == role])
        return [*(m for m in SIX if m in found), *sorted(found - set(SIX))]

    @property
    def twins(self) -> list[str]:
        """Roles of SAEs that could have been trained, untrained first."""
        found = set(self.figures.role) - {TRAINED, FITTED}
        return sorted(found, key=lambda role: (role != UNTRAINED, role))

    def main(self, model: str, role: str = TRAINED) -> str | None:
        """The recipe of a model that was evaluated most; of several such the shortest."""
        rows = self.figures[self.figures.model.eq(model) & self.figures.role.eq(role)]
        if rows.empty:
            return None
        counts = rows.groupby("recipe").evaluation.nunique()
        return min(counts.index, key=lambda recipe: (-counts[recipe], len(recipe), recipe))

    def mains(self, rows: pd.DataFrame, role: str = TRAINED) -> dict[str, pd.DataFrame]:
        """Of a frame's rows, those of each model's main recipe in a role; none without rows."""
        mine = {model: rows[rows.recipe.eq(self.main(model, role))] for model in self.models(role)}
        return {model: found for model, found in mine.items() if len(found)}

    def hours(self, rows: pd.DataFrame) -> float:
        """That the work behind some rows took, their SAEs and their evaluations. What was made at
        the same time on one host, as with `together=true`, counts once."""
        total, busy = 0.0, {}
        for host, start, end in sorted(self.spans[n] for n in {*rows.sae, *rows.evaluation}):
            until = busy.get(host, start)
            total += max(0.0, end - max(start, until))
            busy[host] = max(end, until)
        return total / 3600


def of(rows: pd.DataFrame, key: str) -> list[float]:
    """A figure's values, one a seed."""
    return rows[rows.key == key].groupby("seed").value.mean().tolist()


def mean_of(rows: pd.DataFrame, key: str) -> Interval:
    """Its mean over seeds."""
    return statistics.mean(of(rows, key))


def correlation_of(rows: pd.DataFrame, key: str) -> Interval:
    """The mean of a correlation over seeds (`statistics.mean_correlation`)."""
    return statistics.mean_correlation(of(rows, key))


def recipe_title(recipe: str) -> str:
    """A recipe as a reader calls it: the model, and what else sets it apart."""
    words = dict(word.partition("=")[::2] for word in recipe.split())
    model = model_title(words.pop("model", ""))
    return ", ".join([model, *(f"{name}={value}" for name, value in words.items())])


def read(results: Iterable[Result], cells: int) -> Evidence:
    """Read the finished cells of a sweep.

    Args:
        cells: how many the sweep has.

    Raises:
        ValueError: none is finished.
    """
    results = list(results)
    if not results:
        raise ValueError(f"none of the sweep's {cells} cells is finished: run the sweep first")
    recipes = _recipes([result.overrides for result in results])
    rows: list[dict[str, Any]] = []
    concepts: list[pd.DataFrame] = []
    spans: dict[str, tuple[str, float, float]] = {}
    versions: set[str] = set()
    limits: set[int | None] = set()
    seen = set()
    recipe_of: dict[str, str] = {}  # two cells may ask for one SAE in different words
    for result, recipe in zip(results, recipes, strict=True):
        if result.evaluation in seen:
            continue
        seen.add(result.evaluation)
        origin = read_origin(result.evaluation)
        config, model = origin["config"], origin["config"]["model"]
        limits.add(config["evaluation"].get("limit_images"))
        about = {
            "recipe": recipe_of.setdefault(result.sae.name, recipe),
            "model": model["name"],
            "role": learned_by(config) or TRAINED,
            "latents": model.get("latents"),
            "k": model.get("k"),
            "seed": config["seed"],
            "sae": result.sae.name,
            "evaluation": result.evaluation.name,
            "dataset": config["dataset"]["name"],
        }
        marks = read_json(result.sae / MARK), origin["meta"]
        for stage, mark in zip((result.sae, result.evaluation), marks, strict=True):
            end, took = float(mark["finished"]), float(mark.get("seconds") or 0.0)
            spans[stage.name] = (str(mark.get("host")), end - took, end)
            named = sorted((mark.get("versions") or {}).items())
            versions |= {", ".join(f"{name} {version}" for name, version in named)} - {""}
        accuracies = read_accuracies(result.evaluation)
        if accuracies is not None:
            options = config["evaluation"]
            share = options.get("count_share")
            setting = {
                "protocol": options["protocol"],
                "ranking": options.get("ranking", "frequency"),
                "share": math.nan if share is None else float(share),
            }
            rows += _rows(accuracies, about | setting)
        numbers = read_numbers(result.evaluation)
        measured = (about["sae"], about["dataset"])
        if numbers is not None and measured not in seen:
            seen.add(measured)
            rows += _rows(numbers, about | {"protocol": "", "ranking": "", "share": math.nan})
            of_concepts = read_concepts(result.evaluation)
            if of_concepts is not None:
                concepts.append(of_concepts.assign(**about))
    return Evidence(
        figures=pd.DataFrame(rows, columns=_COLUMNS),
        concepts=pd.concat(concepts, ignore_index=True) if concepts else pd.DataFrame(),
        spans=spans,
        cells=cells,
        finished=len(results),
        versions=tuple(sorted(versions)),
        limits=frozenset(limits),
    )


def _rows(figures: pd.DataFrame, about: Mapping[str, Any]) -> list[dict[str, Any]]:
    pairs = zip(figures.metric, figures.value.astype(float), strict=True)
    return [{**about, "key": key, "value": value} for key, value in pairs]


def _recipes(jobs: Sequence[Sequence[str]]) -> list[str]:
    """Of each job the overrides that decide its SAE but its seed: the model first, and of the
    others those that not all jobs have."""
    kept = [
        [o for o in job if o.partition("=")[0].lstrip("+").partition(".")[0] in _OF_SAE]
        for job in jobs
    ]
    common = set.intersection(*map(set, kept)) if len(kept) > 1 else set()
    return [
        " ".join(sorted({o for o in job if o not in common or o.startswith("model=")}, key=_order))
        for job in kept
    ]


def _order(override: str) -> tuple[bool, str]:
    return not override.startswith("model="), override


def relations(by_sign: Mapping[int, Sequence[str]]) -> list[str]:
    """What rises with, falls with or has no relation to what, by the signs of correlations."""
    words = ((1, "rises with"), (-1, "falls with"), (0, "has no clear correlation with"))
    return [f"{word} {said(by_sign[sign])}" for sign, word in words if by_sign[sign]]


def said(titles: Iterable[str]) -> str:
    """ "A, B and C", or "none"."""
    titles = list(dict.fromkeys(titles))
    return listed(titles) if titles else "none"

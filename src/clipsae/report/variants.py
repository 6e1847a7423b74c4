"""The lines of the tables: results whose settings differ, and what sets them apart.

Two results may be averaged if all settings that decide them are the same but the seed. Otherwise
each is a line of its own.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import pandas as pd

from clipsae.report.names import dataset_title, listed, model_title
from clipsae.report.settings import NOT_SET, Settings, is_of_codes

_FIRST = ("trainer.max_steps", "schema")  # in a label, before others that say as much
_OVERRIDE = re.compile(
    r"(?!\w+\.batches_a_step)(trainer|model|optimizer|features|evaluation)\.[\w.]+=\S+"
)
_HASH = re.compile(r"[0-9a-f]{16,}")
_EXPLAINED = {
    "schema": " (of what the code computes; a smaller number is an older version)",
    "dataset.fingerprint": " (a hash of the images that were evaluated)",
    "dataset.train_fingerprint": " (a hash of the images that were trained on)",
    "train_dataset.fingerprint": " (a hash of the images that were trained on)",
}


@dataclass(frozen=True, order=True)
class Line:
    """A row of the tables: a model by the settings of its results.

    Attributes:
        model: its name.
        common: those of the settings that are not the model's own and that differ in the report,
            such as "trainer.max_steps=3"; "": none does.
        own: the model's own settings that differ between its results.
    """

    model: str
    common: str = ""
    own: str = ""

    @property
    def variant(self) -> str:
        """What sets it apart; "" where nothing does."""
        return ", ".join(label for label in (self.common, self.own) if label)

    @property
    def overrides(self) -> list[str]:
        """Those of `variant` that a command line can ask for."""
        words = self.variant.split(", ")
        return [word for word in words if _OVERRIDE.fullmatch(word)]


def is_own(name: str) -> bool:
    """Whether a setting belongs to a model, so that different models are expected to differ."""
    own = ("model.", "optimizer.", "plugins", "trainer.gradient_clip", "evaluation.count_threshold")
    return name.startswith(own)


class _Result(NamedTuple):
    model: str
    dataset: str
    settings: dict[str, str]
    folder: str


def set_apart(frames: Sequence[pd.DataFrame]) -> tuple[list[pd.DataFrame], list[str]]:
    """Give every row the columns `common` and `own`, see `Line`.

    Args:
        frames: with columns model, dataset, folder, settings.

    Returns:
        The frames, and a sentence for each setting that differs.
    """
    results = [
        _Result(row.model, row.dataset, dict(row.settings), row.folder)
        for frame in frames
        for row in frame[["model", "dataset", "settings", "folder"]].drop_duplicates().itertuples()
    ]
    by_model: dict[str, list[_Result]] = defaultdict(list)
    for result in results:
        by_model[result.model].append(result)
    common = _varying(results, own=False)
    own = {model: _varying(mine, own=True) for model, mine in by_model.items()}
    # Every dataset has a hash of its images: it sets apart where one dataset has several.
    local = {
        name: {d for d, values in _values(results, name).items() if len(values) > 1}
        for name in common
        if name.startswith("dataset.") and name.endswith("fingerprint")
    }

    def projected(names: list[str], dataset: str, settings: Mapping[str, str]) -> Settings:
        return tuple(
            (name, settings[name])
            for name in names
            if name in settings and dataset in local.get(name, {dataset})
        )

    groups = _labels([projected(common, r.dataset, r.settings) for r in results])
    of_model = {
        model: _labels([projected(names, r.dataset, r.settings) for r in by_model[model]])
        for model, names in own.items()
    }
    labelled = []
    for frame in frames:
        rows = [
            (
                groups[projected(common, row.dataset, dict(row.settings))],
                of_model[row.model][projected(own[row.model], row.dataset, dict(row.settings))],
            )
            for row in frame.itertuples()
        ]
        labels = pd.DataFrame(rows, columns=["common", "own"], index=frame.index, dtype=object)
        labelled.append(frame.assign(common=labels.common, own=labels.own))
    sentences = [_sentence(name, results) for name in common]
    for model, names in own.items():
        sentences += [f"{model_title(model)}: {_sentence(n, by_model[model])}" for n in names]
    return labelled, sentences


def _values(results: Sequence[_Result], *names: str) -> dict[Any, set[str | None]]:
    """Which values the first setting has, by dataset and by the other settings."""
    found: dict[Any, set[str | None]] = defaultdict(set)
    for result in results:
        others = tuple(result.settings.get(name) for name in names[1:])
        key = (result.dataset, *others) if others else result.dataset
        found[key].add(result.settings.get(names[0]))
    return found


def _varying(results: Sequence[_Result], *, own: bool) -> list[str]:
    """Names of the settings that differ, in the order in which labels prefer them.

    A setting of a dataset may differ between datasets. Results of another schema are compared
    among themselves: their settings may have other names.
    """
    names = sorted({n for r in results for n in r.settings if is_own(n) == own}, key=_preference)
    found = []
    for name in names:
        values: dict[tuple[str, str | None], set[str | None]] = defaultdict(set)
        for _, dataset, settings, _ in results:
            if name in settings or is_of_codes(name):
                place = dataset if name.startswith("dataset.") else ""
                schema = None if name == "schema" else settings.get("schema")
                values[place, schema].add(settings.get(name))
        if any(len(each) > 1 for each in values.values()):
            found.append(name)
    # Without the hashes of images where another setting says why they differ.
    for name in [n for n in found if n.endswith("fingerprint")]:
        others = [n for n in found if n != name]
        if all(len(each) == 1 for each in _values(results, name, *others).values()):
            found.remove(name)
    return found


def _labels(projections: list[Settings]) -> dict[Settings, str]:
    """A label for each that distinguishes it from the others by as few settings as are needed."""
    distinct = {one: dict(one) for one in projections}
    names = sorted({name for one in distinct for name, _ in one}, key=_preference)
    chosen: list[str] = []

    def parts(by: list[str]) -> int:
        return len({tuple(map(settings.get, by)) for settings in distinct.values()})

    while parts(chosen) < len(distinct):
        chosen.append(max(names, key=lambda name: parts([*chosen, name])))
    return {
        one: ", ".join(f"{n}={_short(settings[n])}" for n in chosen if n in settings)
        for one, settings in distinct.items()
    }


def _sentence(name: str, results: Sequence[_Result]) -> str:
    """How many results have which value of a setting."""
    where: dict[str, dict[str, str]] = defaultdict(dict)
    for model, dataset, settings, folder in results:
        if name in settings or is_of_codes(name):
            place = f"{model_title(model)} on {dataset_title(dataset)}"
            where[settings.get(name, NOT_SET)][folder] = place
    parts = []
    for value, folders in sorted(where.items(), key=lambda item: -len(item[1])):
        places, count = Counter(folders.values()), len(folders)
        places_listed = f" ({', '.join(places)})" if len(places) <= 2 else ""
        parts.append(f"{_short(value)} in {count} result{'s' * (count != 1)}{places_listed}")
    return f"{name}{_EXPLAINED.get(name, '')} is {listed(parts)}."


def _short(value: str) -> str:
    return _HASH.sub(lambda found: found[0][:8], value)


def _preference(name: str) -> tuple[int, str]:
    return _FIRST.index(name) if name in _FIRST else len(_FIRST), name

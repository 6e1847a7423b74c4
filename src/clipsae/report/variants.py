"""Results that are not alike, told apart: the lines of the tables, and what sets them apart.

Two results are alike, and may be averaged, if all settings that decide them are the same but the
seed. Of those that are not, every one is a line of its own.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import pandas as pd

from clipsae.report.names import dataset_title, model_title
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
        common: those of the settings that are not the model's own and not alike in the whole
            report, such as "trainer.max_steps=3"; "": all are alike.
        own: the model's own settings that are not alike in its results.
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


def set_apart(frames: Sequence[pd.DataFrame]) -> tuple[list[pd.DataFrame], list[str]]:
    """Give every row the columns `common` and `own`, see `Line`.

    Args:
        frames: with columns model, dataset, folder, settings.

    Returns:
        The frames, and a sentence for each setting that is not alike.
    """
    found = [
        (row.model, row.dataset, dict(row.settings), row.folder)
        for frame in frames
        for row in frame[["model", "dataset", "settings", "folder"]].drop_duplicates().itertuples()
    ]
    common = _varying([(d, s) for _, d, s, _ in found], own=False)
    own: dict[str, list[str]] = {}
    for model in dict.fromkeys(m for m, *_ in found):
        own[model] = _varying([(d, s) for m, d, s, _ in found if m == model], own=True)
    local = _varying_hashes([(d, s) for _, d, s, _ in found], common)

    def projected(names: list[str], dataset: str, settings: Mapping[str, str]) -> Settings:
        return tuple(
            (name, settings[name])
            for name in names
            if name in settings and dataset in local.get(name, {dataset})
        )

    groups = _labels([projected(common, d, s) for _, d, s, _ in found])
    of_model = {
        model: _labels([projected(names, d, s) for m, d, s, _ in found if m == model])
        for model, names in own.items()
    }
    told = []
    for frame in frames:
        rows = [
            (
                groups[projected(common, row.dataset, dict(row.settings))],
                of_model[row.model][projected(own[row.model], row.dataset, dict(row.settings))],
            )
            for row in frame.itertuples()
        ]
        labels = pd.DataFrame(rows, columns=["common", "own"], index=frame.index, dtype=object)
        told.append(frame.assign(common=labels.common, own=labels.own))
    sentences = [_sentence(name, found) for name in common]
    for model, names in own.items():
        of = [one for one in found if one[0] == model]
        sentences += [f"{model_title(model)}: {_sentence(name, of)}" for name in names]
    return told, sentences


def _varying(results: Sequence[tuple[str, Mapping[str, str]]], *, own: bool) -> list[str]:
    """Names of the settings that are not alike, in the order in which labels prefer them.

    A setting of a dataset may differ between datasets. Results of another schema are compared
    among themselves: their settings may have other names.
    """
    names = sorted({n for _, s in results for n in s if is_own(n) == own}, key=_preference)
    found = []
    for name in names:
        values: dict[tuple[str, str | None], set[str | None]] = defaultdict(set)
        for dataset, settings in results:
            if name in settings or is_of_codes(name):
                place = dataset if name.startswith("dataset.") else ""
                schema = None if name == "schema" else settings.get("schema")
                values[place, schema].add(settings.get(name))
        if any(len(of) > 1 for of in values.values()):
            found.append(name)
    return _explained(results, found)


def _explained(results: Sequence[tuple[str, Mapping[str, str]]], names: list[str]) -> list[str]:
    """Without the hashes of images where another setting says why they are others."""
    kept = list(names)
    for name in [n for n in names if n.endswith("fingerprint")]:
        others = [n for n in kept if n != name]
        values = defaultdict(set)
        for dataset, settings in results:
            values[dataset, *(settings.get(n) for n in others)].add(settings.get(name))
        if all(len(of) == 1 for of in values.values()):
            kept.remove(name)
    return kept


def _varying_hashes(
    results: Sequence[tuple[str, Mapping[str, str]]], names: list[str]
) -> dict[str, set[str]]:
    """Of the hashes of datasets' images: on which datasets they are not alike. Every dataset has
    its own; where it is the only one it sets nothing apart."""
    found = {}
    for name in names:
        if name.startswith("dataset.") and name.endswith("fingerprint"):
            values = defaultdict(set)
            for dataset, settings in results:
                values[dataset].add(settings.get(name))
            found[name] = {dataset for dataset, of in values.items() if len(of) > 1}
    return found


def _labels(projections: list[Settings]) -> dict[Settings, str]:
    """A label for each that tells it from the others by as few settings as are needed."""
    distinct = list(dict.fromkeys(projections))
    names = sorted({name for one in distinct for name, _ in one}, key=_preference)
    chosen: list[str] = []

    def parts(by: list[str]) -> int:
        return len({tuple(dict(one).get(name) for name in by) for one in distinct})

    while parts(chosen) < len(distinct):
        chosen.append(max(names, key=lambda name: parts([*chosen, name])))
    return {
        one: ", ".join(f"{n}={_short(dict(one)[n])}" for n in chosen if n in dict(one))
        for one in distinct
    }


def _sentence(name: str, found: Sequence[tuple[str, str, Mapping[str, str], str]]) -> str:
    """How many results have which value of a setting."""
    where: dict[str, dict[str, str]] = defaultdict(dict)
    for model, dataset, settings, folder in found:
        if name in settings or is_of_codes(name):
            place = f"{model_title(model)} on {dataset_title(dataset)}"
            where[settings.get(name, NOT_SET)][folder] = place
    parts = []
    for value, of in sorted(where.items(), key=lambda item: -len(item[1])):
        places = Counter(of.values())
        listed = f" ({', '.join(places)})" if len(places) <= 2 else ""
        parts.append(f"{_short(value)} in {len(of)} result{'s' * (len(of) != 1)}{listed}")
    return f"{name}{_EXPLAINED.get(name, '')} is {_listed(parts)}."


def _short(value: str) -> str:
    return _HASH.sub(lambda found: found[0][:8], value)


def _preference(name: str) -> tuple[int, str]:
    return _FIRST.index(name) if name in _FIRST else len(_FIRST), name


def _listed(words: Iterable[str]) -> str:
    *most, last = words
    return f"{', '.join(most)} and {last}" if most else last

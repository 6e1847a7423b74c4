"""What the store holds: all finished evaluations as tidy frames.

Any number, of any age. A folder that cannot be read is named in one line and left out.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from clipsae.evaluation.numbers import SETTINGS, current_names
from clipsae.overrides import renamed
from clipsae.report.settings import Settings, of_metrics, of_topn, settings_of
from clipsae.store import MARK, Store
from clipsae.store.files import read_json

IDENTITY = ("model", "dataset", "clip", "latents", "k", "seed")
NO_K = 0  # of variants that have no k
_RESULT_COLUMNS = (*IDENTITY, "protocol", "setting", "n", "accuracy", "images", "classes")
_COMPETING = "competing"  # classes that an image could be given; results of older versions lack it
_METRIC_COLUMNS = (*IDENTITY, "metric", "value")
_MEASUREMENT_COLUMNS = (*_METRIC_COLUMNS, "image_encoder", "pooling")
_UNREADABLE = (
    OSError,
    ValueError,
    TypeError,
    KeyError,
    AttributeError,
    OmegaConfBaseException,
    YAMLError,
)


@dataclass(frozen=True)
class Collected:
    """Everything readable in a store.

    Every frame has the columns of `IDENTITY` (k is `NO_K` for variants without), `weights`,
    `layer`, `folder` (its name), `finished` (seconds since 1970), `settings` (all that decides the
    figures but what `IDENTITY` says).

    Attributes:
        results: a row a (evaluation, setting, n): metric ("no_sae", "on_5", "on_all" for all M),
            value (macro accuracy, %), protocol, images, classes (those with images), competing
            (those that an image could be given).
        measurements: a row a (evaluation, metric): metric, value, image_encoder, pooling.
        origins: folder name -> {"meta": ..., "config": ...}.
        problems: a line for each folder that was left out.
    """

    results: pd.DataFrame
    measurements: pd.DataFrame
    origins: dict[str, dict[str, Any]]
    problems: list[str]


def collect(root: Path | str) -> Collected:
    """Read all finished evaluations of the store at `root`."""
    store = Store(root)
    results, measurements = [], []
    origins: dict[str, dict[str, Any]] = {}
    problems = []
    for folder in store.finished("evaluation"):
        try:
            origin = _origin(folder)
            common = _common(origin, folder)
            settings = _settings(store.root, origin)
            parts = []
            if (folder / "results.csv").exists() or not (folder / "metrics.csv").exists():
                parts.append((results, _with(_evaluation(folder), common, of_topn(settings))))
            if (folder / "metrics.csv").exists():
                found = _with(_measurement(folder), common, of_metrics(settings))
                parts.append((measurements, found))
        except _UNREADABLE as error:
            why = " ".join(str(error).split()) or type(error).__name__
            problems.append(f"evaluation/{folder.name}: {why.replace(f'{folder}/', '')}")
        else:
            origins[folder.name] = origin
            for frames, frame in parts:
                frames.append(frame)
    if old := len(list(store.finished("measurement"))):
        problems.append(
            f"measurement: {old} of an earlier version, ignored; the commands that made them make "
            "them again, as a part of the evaluation"
        )
    columns = ["weights", "layer", "folder", "finished", "settings"]
    return Collected(
        results=_stack(
            results, [*_METRIC_COLUMNS, "protocol", "images", "classes", _COMPETING, *columns]
        ),
        measurements=_stack(measurements, [*_MEASUREMENT_COLUMNS, *columns]),
        origins=origins,
        problems=problems,
    )


def _origin(folder: Path) -> dict[str, Any]:
    meta = json.loads((folder / MARK).read_text())
    config = OmegaConf.to_container(OmegaConf.load(folder / "config.yaml"))
    if not isinstance(meta, dict) or not isinstance(config, dict):
        raise ValueError(f"{MARK} and config.yaml: expected mappings")
    for old, (new, value) in renamed(config).items():
        group, key = new.split(".")
        config.setdefault(group, {})[key] = value
        config[old.partition(".")[0]].pop(old.partition(".")[2])
    return {"meta": meta, "config": config}


def _common(origin: dict[str, Any], folder: Path) -> dict[str, Any]:
    clip = origin["config"]["clip"]
    return {
        "weights": str(clip.get("pretrained")),
        "layer": int(clip["layer"]),
        "folder": folder.name,
        "finished": float(origin["meta"]["finished"]),
    }


def _settings(root: Path, origin: dict[str, Any]) -> Settings:
    meta = origin["meta"]
    key = meta.get("key") or {}
    of_sae = read_json(root / "sae" / str(key.get("sae")) / MARK).get("key") or {}
    return settings_of(key, of_sae, origin["config"], meta.get("schema"))


def _with(rows: pd.DataFrame, common: dict[str, Any], settings: Settings) -> pd.DataFrame:
    same = pd.Series([settings] * len(rows), index=rows.index, dtype=object)
    return rows.assign(**common, settings=same)


def _evaluation(folder: Path) -> pd.DataFrame:
    rows = _table(folder / "results.csv", _RESULT_COLUMNS)
    unknown = set(rows.setting) - set(SETTINGS)
    if unknown:
        raise ValueError(f"results.csv: setting {min(unknown)!r}, not one of {', '.join(SETTINGS)}")
    if _COMPETING not in rows:
        rows[_COMPETING] = rows.classes
    rows["value"] = rows.accuracy.astype(float)
    counts = rows.n.astype(float)
    rows["metric"] = [
        "no_sae" if setting == "no_sae" else f"{setting}_{'all' if n == latents else int(n)}"
        for setting, n, latents in zip(rows.setting, counts, rows.latents, strict=True)
    ]
    return rows


def _measurement(folder: Path) -> pd.DataFrame:
    rows = _table(folder / "metrics.csv", _MEASUREMENT_COLUMNS)
    rows["metric"] = list(current_names(dict.fromkeys(rows.metric, 0.0)))
    rows["value"] = rows.value.astype(float)
    for name in ("image_encoder", "pooling"):
        rows[name] = rows[name].astype(object).fillna("").astype(str)
    return rows


def _table(path: Path, columns: tuple[str, ...]) -> pd.DataFrame:
    """A CSV file with whole numbers where they are whole."""
    rows = pd.read_csv(path)
    absent = [name for name in columns if name not in rows.columns]
    if absent:
        raise ValueError(f"{path.name} lacks the columns {', '.join(absent)}")
    if rows.empty:
        raise ValueError(f"{path.name} has no rows")
    rows["k"] = rows.k.fillna(NO_K).astype(int)
    for name in ("latents", "seed"):
        rows[name] = rows[name].astype(int)
    for name in ("model", "dataset", "clip"):
        rows[name] = rows[name].astype(str)
    return rows


def _stack(frames: list[pd.DataFrame], columns: list[str]) -> pd.DataFrame:
    if not frames:
        return pd.DataFrame(columns=columns)
    return pd.concat(frames, ignore_index=True)[columns]

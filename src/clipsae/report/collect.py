"""What the store holds: all finished evaluations and measurements as tidy frames.

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
from clipsae.report.settings import Settings, of_the_codes, settings_of
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
        diagnostics: a row a (evaluation, metric): metric, value; also protocol.
        measurements: a row a (measurement, metric): metric, value, image_encoder, pooling.
        origins: folder name -> {"meta": ..., "config": ...}.
        problems: a line for each folder that was left out.
    """

    results: pd.DataFrame
    diagnostics: pd.DataFrame
    measurements: pd.DataFrame
    origins: dict[str, dict[str, Any]]
    problems: list[str]


def collect(root: Path | str) -> Collected:
    """Read all finished evaluations and measurements of the store at `root`."""
    store = Store(root)
    results, diagnostics, measurements = [], [], []
    origins: dict[str, dict[str, Any]] = {}
    problems = []
    for kind in ("evaluation", "measurement"):
        for folder in store.finished(kind):
            try:
                origin = _origin(folder)
                common = _common(origin, folder)
                settings = _settings(store.root, origin)
                if kind == "evaluation":
                    rows, metrics = _evaluation(folder)
                    results.append(_with(rows, common, settings))
                    diagnostics.append(_with(metrics, common, of_the_codes(settings)))
                else:
                    measurements.append(_with(_measurement(folder), common, settings))
            except _UNREADABLE as error:
                why = " ".join(str(error).split()) or type(error).__name__
                problems.append(f"{kind}/{folder.name}: {why.replace(f'{folder}/', '')}")
            else:
                origins[folder.name] = origin
    columns = ["weights", "layer", "folder", "finished", "settings"]
    return Collected(
        results=_stack(
            results, [*_METRIC_COLUMNS, "protocol", "images", "classes", _COMPETING, *columns]
        ),
        diagnostics=_stack(diagnostics, [*_METRIC_COLUMNS, "protocol", *columns]),
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


def _evaluation(folder: Path) -> tuple[pd.DataFrame, pd.DataFrame]:
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
    content = json.loads((folder / "diagnostics.json").read_text())
    l0 = content["active"] if "active" in content else content["l0"]  # clipsae 0.1: active
    metrics = {"l0": l0, **current_names(content.get("sparsity") or {})}
    first = {name: rows[name].iloc[0] for name in (*IDENTITY, "protocol")}
    found = [{**first, "metric": name, "value": float(v)} for name, v in metrics.items()]
    return rows, pd.DataFrame(found)


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

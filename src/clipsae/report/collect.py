"""What the store holds: all finished evaluations as one tidy frame.

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
from clipsae.report.settings import decides_codes, learned_by, settings_of
from clipsae.store import MARK, Store
from clipsae.store.files import read_json

IDENTITY = ["model", "dataset", "clip", "latents", "k", "seed"]
ENCODER = ["image_encoder", "pooling"]
NO_K = 0  # of models without k
_IN_FILE = {
    "results.csv": [*IDENTITY, "protocol", "setting", "n", "accuracy", "images", "classes"],
    "metrics.csv": [*IDENTITY, "metric", "value", *ENCODER],
}
_ABOUT = ["weights", "layer", "learned", "folder", "finished", "settings"]
_COUNTS = ["images", "classes", "competing"]
_CONCEPTS = ["level", "concept", "attribute", "auroc", "f1", "folder"]
_WAY = ["protocol", "ranking"]
_COLUMNS = [*IDENTITY, "metric", "value", "measured", *_WAY, *_COUNTS, *ENCODER, *_ABOUT]
_UNREADABLE = (
    *(OSError, ValueError, TypeError, KeyError, AttributeError),
    *(OmegaConfBaseException, YAMLError),
)


@dataclass(frozen=True)
class Collected:
    """Everything readable in a store.

    Attributes:
        figures: a row a figure of an evaluation: `IDENTITY` (k is `NO_K` for models without),
            metric ("no_sae", "on_5", "on_all" for all M, or a measured number's key), value (an
            accuracy is macro, in %), measured (False: an accuracy). Accuracies have protocol,
            ranking, images, classes (with images) and competing (that an image could be given);
            MonoSemanticity has image_encoder and pooling, "" elsewhere. Of the evaluation: weights,
            layer, learned (see `learned_by`), folder (its name), finished (seconds since 1970),
            settings (see `settings_of`).
        concepts: a row a known concept of an evaluation that measured recovery: level, concept,
            attribute, auroc, f1 of its latent, further columns of `concepts.csv`, folder.
        origins: folder name -> {"meta": ..., "config": ...}.
        problems: a line for each folder that was left out.
    """

    figures: pd.DataFrame
    concepts: pd.DataFrame
    origins: dict[str, dict[str, Any]]
    problems: list[str]


def collect(root: Path | str) -> Collected:
    """Read all finished evaluations of the store at `root`."""
    store = Store(root)
    frames: list[pd.DataFrame] = []
    concepts: list[pd.DataFrame] = []
    origins: dict[str, dict[str, Any]] = {}
    problems = []
    for folder in store.finished("evaluation"):
        try:
            origin = read_origin(folder)
            found = _figures(store.root, folder, **origin)
            of_concepts = read_concepts(folder)
        except _UNREADABLE as error:
            why = " ".join(str(error).split()) or type(error).__name__
            problems.append(f"evaluation/{folder.name}: {why.replace(f'{folder}/', '')}")
        else:
            origins[folder.name] = origin
            frames += found
            if of_concepts is not None:
                concepts.append(of_concepts.assign(folder=folder.name))
    if old := len(list(store.finished("measurement"))):
        problems.append(
            f"measurement: {old} of an earlier version, ignored; the commands that made them make "
            "them again, as a part of the evaluation"
        )
    figures = pd.concat(frames, ignore_index=True) if frames else pd.DataFrame()
    figures = figures.reindex(columns=_COLUMNS)
    figures["k"] = figures.k.fillna(NO_K).astype(int)
    # Image encoder and pooling set MonoSemanticity alone apart.
    others = ~figures.metric.astype(str).str.startswith("monosemanticity_")
    figures[ENCODER] = figures[ENCODER].astype(object).fillna("").astype(str).mask(others, "")
    figures["competing"] = figures.competing.fillna(figures.classes)  # older results lack it
    figures["ranking"] = figures.ranking.astype(object).fillna("frequency")
    known = pd.concat(concepts, ignore_index=True) if concepts else pd.DataFrame(columns=_CONCEPTS)
    return Collected(figures, known, origins, problems)


def _figures(
    root: Path, folder: Path, meta: dict[str, Any], config: dict[str, Any]
) -> list[pd.DataFrame]:
    """Accuracies and measured numbers of one evaluation, those that it has."""
    key = meta.get("key") or {}
    of_sae = read_json(root / "sae" / str(key.get("sae")) / MARK).get("key") or {}
    settings = settings_of(key, of_sae, config, meta.get("schema"))
    about: dict[str, Any] = {
        "weights": str(config["clip"].get("pretrained")),
        "layer": int(config["clip"]["layer"]),
        "learned": learned_by(config),
        "folder": folder.name,
        "finished": float(meta["finished"]),
    }
    accuracies, numbers = read_accuracies(folder), read_numbers(folder)
    if accuracies is None and numbers is None:
        raise ValueError("neither results.csv nor metrics.csv is there")
    found = []
    if accuracies is not None:
        deciding = tuple(s for s in settings if not s[0].startswith("measurement."))
        found.append((accuracies.assign(measured=False, **about), deciding))
    if numbers is not None:
        numbers = numbers.drop(columns="images", errors="ignore")
        deciding = tuple(
            s for s in settings if decides_codes(s[0]) or s[0].startswith("measurement.")
        )
        found.append((numbers.assign(measured=True, **about), deciding))
    for rows, deciding in found:
        rows["settings"] = [deciding] * len(rows)
    return [rows for rows, _ in found]


# --- the files of an evaluation ---


def read_origin(folder: Path) -> dict[str, Any]:
    """Where a finished evaluation comes from: {"meta": ..., "config": ...}, the config by today's
    names.

    Raises:
        ValueError, OSError, OmegaConf's errors: they cannot be read.
    """
    meta = json.loads((folder / MARK).read_text())
    config: Any = OmegaConf.to_container(OmegaConf.load(folder / "config.yaml"))
    if not isinstance(meta, dict) or not isinstance(config, dict):
        raise ValueError(f"{MARK} and config.yaml: expected mappings")
    for old, (new, value) in renamed(config).items():
        if "=" in new:  # it has other values now
            continue
        (old_group, old_key), (group, key) = old.split("."), new.split(".")
        config.setdefault(group, {})[key] = value
        config[old_group].pop(old_key)
    return {"meta": meta, "config": config}


def read_accuracies(folder: Path) -> pd.DataFrame | None:
    """The rows of `results.csv`, with metric ("no_sae", "on_5", "on_all" for all M) and value (in
    %); None: there is no such file.

    Raises:
        ValueError: a column or all rows are lacking, or a setting is unknown.
    """
    rows = _read(folder / "results.csv", "accuracy")
    if rows is None:
        return None
    if unknown := set(rows.setting) - set(SETTINGS):
        known = ", ".join(SETTINGS)
        raise ValueError(f"results.csv: setting {min(unknown)!r}, not one of {known}")
    kept = zip(rows.setting, rows.n.astype(float), rows.latents, strict=True)
    metric = [
        "no_sae" if setting == "no_sae" else f"{setting}_{'all' if n == latents else int(n)}"
        for setting, n, latents in kept
    ]
    return rows.assign(metric=metric)


def read_numbers(folder: Path) -> pd.DataFrame | None:
    """The rows of `metrics.csv`, with metric by today's name and value; None: there is no such
    file.

    Raises:
        ValueError: a column or all rows are lacking.
    """
    rows = _read(folder / "metrics.csv", "value")
    if rows is None:
        return None
    return rows.assign(metric=list(current_names(dict.fromkeys(rows.metric, 0.0))))


def read_concepts(folder: Path) -> pd.DataFrame | None:
    """The rows of `concepts.csv`, with the attribute; None: the recovery of concepts was not
    measured.

    Raises:
        ValueError: a column is lacking.
    """
    path = folder / "concepts.csv"
    if not path.exists():
        return None
    rows = pd.read_csv(path)
    if absent := [name for name in ("level", "concept", "auroc", "f1") if name not in rows]:
        raise ValueError(f"{path.name} lacks the columns {', '.join(absent)}")
    if "attribute" not in rows:
        rows["attribute"] = rows.concept.str.partition("=")[0]
    return rows


def _read(path: Path, value: str) -> pd.DataFrame | None:
    """A CSV file, with one of its columns as `value`; None: it is not there."""
    if not path.exists():
        return None
    rows = pd.read_csv(path)
    if absent := [name for name in _IN_FILE[path.name] if name not in rows.columns]:
        raise ValueError(f"{path.name} lacks the columns {', '.join(absent)}")
    if rows.empty:
        raise ValueError(f"{path.name} has no rows")
    rows["value"] = rows[value].astype(float)
    numbers = dict.fromkeys(["latents", "seed"], int)
    return rows.astype(numbers | dict.fromkeys(["model", "dataset", "clip"], str))

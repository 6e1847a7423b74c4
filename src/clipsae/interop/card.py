"""The model card of a published SAE: what it is, what was measured, how it is used."""

import csv
import json
from pathlib import Path
from typing import Any

import yaml

from clipsae.evaluation.numbers import current_names
from clipsae.sae import SAE


def model_card(sae: SAE, repo_id: str, folder: Path | None = None) -> str:
    """A README.md for the Hub.

    Args:
        repo_id: what `clipsae.load` will be called with.
        folder: the SAE's own in a store: its config, and the evaluations of it that lie in the
            same store.
    """
    config = _config(folder)
    clip = config.get("clip", {})
    front = {
        "library_name": "clipsae",
        "tags": ["sparse-autoencoder", "interpretability", "clip", sae.config["activation"]],
    }
    parts = [
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---",
        f"# {repo_id.rpartition('/')[2]}",
        _what(sae, config, clip),
        "## Use\n\n```python\n" + _use(repo_id, clip) + "```",
    ]
    results = _results(folder)
    if results:
        parts.append("## Results\n\n" + "\n\n".join(results))
    parts.append("## Config\n\n```json\n" + json.dumps(sae.config, indent=2) + "\n```")
    return "\n\n".join(parts) + "\n"


def _config(folder: Path | None) -> dict[str, Any]:
    """The config that a store keeps beside an SAE; empty where there is none."""
    path = None if folder is None else folder / "config.yaml"
    if path is None or not path.is_file():
        return {}
    content = yaml.safe_load(path.read_text())
    return content if isinstance(content, dict) else {}


def _what(sae: SAE, config: dict[str, Any], clip: dict[str, Any]) -> str:
    kind = f"{sae.config['architecture']} sparse autoencoder with {sae.config['activation']}"
    text = f"A {kind}: {sae.latents:,} latents on tokens of width {sae.d}"
    if clip:
        text += f", the output of block {clip['layer']} of {clip['name']} ({clip['pretrained']})"
    images = config.get("train_dataset", {}).get("name") or config.get("dataset", {}).get("name")
    steps = config.get("trainer", {}).get("max_steps")
    if images and steps and "imported" not in config.get("model", {}):
        text += f"; trained for {steps:,} steps on {images}, seed {config.get('seed')}"
    return f"{text}."


def _use(repo_id: str, clip: dict[str, Any]) -> str:
    name = clip.get("name", "ViT-B-16-quickgelu")
    weights, layer = clip.get("pretrained", "openai"), clip.get("layer", -2)
    return (
        "from clipsae import FrozenCLIP, load\n\n"
        f"clip = FrozenCLIP.load({name!r}, {weights!r}, layer={layer})\n"
        f"sae = load({repo_id!r})\n"
        "tokens = clip.prefix(clip.normalize(images))  # images: uint8 [B, 3, S, S]\n"
        "codes = sae.encode(tokens)\n"
        "reconstruction = sae.decode(codes, sae.input_scale(tokens))\n"
        "embedding = clip.tail(reconstruction)\n"
    )


def _results(folder: Path | None) -> list[str]:
    """A table of accuracies and one of measurements, a row a dataset, as far as there are."""
    if folder is None:
        return []
    accuracies = {
        _label(rows[0]): {_column(row): float(row["accuracy"]) for row in rows}
        for rows in _tables(folder, "evaluation", "results.csv")
    }
    measured = {
        _label(rows[0]): current_names({row["metric"]: float(row["value"]) for row in rows})
        for rows in _tables(folder, "evaluation", "metrics.csv")
    }
    found = []
    if accuracies:
        columns = list(dict.fromkeys(name for one in accuracies.values() for name in one))
        table = _table(accuracies, {name: (name, ".2f") for name in columns})
        found.append(
            "Top-n concept classification, macro accuracy in percent (`on_n`: only the class's n "
            "latents, chosen with the image's true label):\n\n" + table
        )
    if measured:
        from clipsae.evaluation.metrics import NUMBERS  # imports Lightning, to load does not

        numbers = {n.key: (n.label, n.format) for n in NUMBERS if n.headline}
        found.append("Measured on the evaluated images:\n\n" + _table(measured, numbers))
    return found


def _tables(folder: Path, kind: str, name: str) -> list[list[dict[str, str]]]:
    """The non-empty CSV files of what a store has of this SAE, by dataset."""
    found = []
    for mark in sorted((folder.parent.parent / kind).glob("[!.]*/meta.json")):
        if json.loads(mark.read_text()).get("key", {}).get("sae") != folder.name:
            continue
        path = mark.parent / name
        if path.is_file():
            with path.open(newline="") as file:
                rows = list(csv.DictReader(file))
            if rows:
                found.append(rows)
    return found


def _label(row: dict[str, str]) -> str:
    protocol = ", heldout protocol" if row.get("protocol") == "heldout" else ""
    return f"{row['dataset']} ({row['images']} images{protocol})"


def _column(row: dict[str, str]) -> str:
    return f"{row['setting']}_{float(row['n']):.0f}" if row["n"] else row["setting"]


def _table(rows: dict[str, dict[str, float]], columns: dict[str, tuple[str, str]]) -> str:
    """Columns: key -> label and format."""
    names = [name for name in columns if any(name in row for row in rows.values())]
    lines = [
        "| dataset | " + " | ".join(columns[name][0] for name in names) + " |",
        "|" + "---|" * (len(names) + 1),
    ]
    for dataset, row in rows.items():
        cells = [format(row[name], columns[name][1]) if name in row else "" for name in names]
        lines.append(f"| {dataset} | " + " | ".join(cells) + " |")
    return "\n".join(lines)

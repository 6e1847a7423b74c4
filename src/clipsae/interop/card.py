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
        folder: the SAE's folder in a store: its config, and its evaluations in the same store,
            go into the card.
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
        _description(sae, config, clip),
        f"## Use\n\n```python\n{_example(repo_id, clip)}```",
        *_results(folder),
        f"## Config\n\n```json\n{json.dumps(sae.config, indent=2)}\n```",
    ]
    return "\n\n".join(parts) + "\n"


def _config(folder: Path | None) -> dict[str, Any]:
    """The config that a store keeps beside an SAE; empty where there is none."""
    path = None if folder is None else folder / "config.yaml"
    if path is None or not path.is_file():
        return {}
    content = yaml.safe_load(path.read_text())
    return content if isinstance(content, dict) else {}


def _description(sae: SAE, config: dict[str, Any], clip: dict[str, Any]) -> str:
    kind = f"{sae.config['architecture']} sparse autoencoder with {sae.config['activation']}"
    text = f"A {kind}: {sae.latents:,} latents on tokens of width {sae.d}"
    if clip:
        text += f", the output of block {clip['layer']} of {clip['name']} ({clip['pretrained']})"
    images = config.get("train_dataset", {}).get("name") or config.get("dataset", {}).get("name")
    steps = config.get("trainer", {}).get("max_steps")
    if images and steps and "imported" not in config.get("model", {}):
        text += f"; trained for {steps:,} steps on {images}, seed {config.get('seed')}"
    return f"{text}."


def _example(repo_id: str, clip: dict[str, Any]) -> str:
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
    """A table of accuracies and one of measurements, a row a dataset, where there are any."""
    accuracies: dict[str, dict[str, str]] = {}
    measured: dict[str, dict[str, float]] = {}
    evaluations = [] if folder is None else (folder.parent.parent / "evaluation").glob("[!.]*")
    for evaluation in sorted(evaluations):
        meta = evaluation / "meta.json"
        about = json.loads(meta.read_text()) if meta.is_file() else {}
        if folder is None or about.get("key", {}).get("sae") != folder.name:
            continue
        for label, row in _rows(evaluation / "results.csv"):
            setting = f"{row['setting']}_{float(row['n']):.0f}" if row["n"] else row["setting"]
            accuracies.setdefault(label, {})[setting] = format(float(row["accuracy"]), ".2f")
        for label, row in _rows(evaluation / "metrics.csv"):
            measured.setdefault(label, {})[row["metric"]] = float(row["value"])
    found = []
    if accuracies:
        found.append(
            "Top-n concept classification, macro accuracy in percent (`on_n`: only the class's n "
            f"latents, chosen with the image's true label):\n\n{_table(accuracies)}"
        )
    if measured:
        from clipsae.evaluation.metrics import NUMBERS  # imports Lightning, to load does not

        shown = {}
        for label, values in measured.items():
            values = current_names(values)
            numbers = (n for n in NUMBERS if n.headline and n.key in values)
            shown[label] = {n.label: format(values[n.key], n.format) for n in numbers}
        found.append(f"Measured on the evaluated images:\n\n{_table(shown)}")
    return ["## Results", *found] if found else []


def _rows(path: Path) -> list[tuple[str, dict[str, str]]]:
    """A CSV file's rows, each with what it was measured on; none where there is no file."""
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    heldout = [", heldout protocol" if r.get("protocol") == "heldout" else "" for r in rows]
    return [
        (f"{row['dataset']} ({row['images']} images{protocol})", row)
        for row, protocol in zip(rows, heldout, strict=True)
    ]


def _table(rows: dict[str, dict[str, str]]) -> str:
    columns = list(dict.fromkeys(name for row in rows.values() for name in row))
    lines = [["dataset", *columns], ["---"] * (len(columns) + 1)]
    lines += [[label, *(row.get(name, "") for name in columns)] for label, row in rows.items()]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)

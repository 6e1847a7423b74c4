"""The model card of a published SAE: what it is, what was measured, how it is used."""

import csv
import json
from pathlib import Path
from typing import Any

import yaml

from clipsae.evaluation.numbers import current_names
from clipsae.sae import SAE

# Of an evaluation's key what chooses which numbers there are, and leaves each of them as it is.
_CHOICES = ("evaluation.ns", "evaluation.settings", "measurement.metrics", "measurement.plugins")

# What the tokens are, by `clip.hook`.
_READ = {
    "resid": "the output of block {}",
    "attn_out": "the output of the attention of block {}",
    "mlp_out": "the output of the MLP of block {}",
    "embedding": "the image embedding",
    "towers": "the unit-length embeddings of images and of their captions",
}


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
        f"## Use\n\n```python\n{_example(repo_id, clip, sae)}```",
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
    article = "An" if kind[0] in "aeiou" else "A"
    text = f"{article} {kind}: {sae.latents:,} latents on tokens of width {sae.d}"
    if clip:
        what = _READ[clip.get("hook", "resid")].format(clip["layer"])
        text += f", {what} of {clip['name']} ({clip['pretrained']})"
    images = config.get("train_dataset", {}).get("name") or config.get("dataset", {}).get("name")
    steps = config.get("trainer", {}).get("max_steps")
    model = config.get("model", {})
    if model.get("fit"):
        text += f"; not trained: {model['fit']} of the tokens of {model['initial_images']:,} images"
        text += f" of {images}, seed {config.get('seed')}"
    elif steps == 0 and "imported" not in model:
        text += f"; not trained: as initialised, seed {config.get('seed')}"
    elif images and steps and "imported" not in model:
        text += f"; trained for {steps:,} steps on {images}, seed {config.get('seed')}"
    return f"{text}."


def _example(repo_id: str, clip: dict[str, Any], sae: SAE) -> str:
    name = clip.get("name", "ViT-B-16-quickgelu")
    weights, layer = clip.get("pretrained", "openai"), clip.get("layer", -2)
    hook = clip.get("hook", "resid")
    at = f"layer={layer}" if hook == "resid" else f"layer={layer}, hook={hook!r}"
    of, target = sae.config["tokens"], sae.config["target_layer"]
    uint8 = "  # images: uint8 [B, 3, S, S]"
    beside = hook in ("attn_out", "mlp_out")  # the tail needs more than the tokens
    several = beside and target is None
    streams = "tokens" if of == "all" else "streams"
    given = "clip.normalize(images)" + ", with_context=True" * several
    lines = [f"{streams}{', context' * several} = clip.prefix({given}){uint8}"]
    if of != "all":
        lines.append(f"tokens = streams[:, clip.token_slice({of!r})]")
    lines += [
        "codes = sae.encode(tokens)",
        "reconstruction = sae.decode(codes, sae.input_scale(tokens))",
    ]
    tail, replaced = "clip", "reconstruction"
    if target is not None:
        tail = "target"
        lines.append(f"target = clip.at({target})  # the reconstruction is of its tokens")
        if beside or of != "all":
            lines.append(
                "streams, context = target.prefix(clip.normalize(images), with_context=True)"
            )
    if of != "all":
        replaced = f"clip.with_tokens(streams, reconstruction, {of!r})"
    lines.append(f"embedding = {tail}.tail({replaced}{', context' * beside})")
    return (
        "from clipsae import FrozenCLIP, load\n\n"
        f"clip = FrozenCLIP.load({name!r}, {weights!r}, {at})\n"
        f"sae = load({repo_id!r})\n" + "\n".join(lines) + "\n"
    )


def _results(folder: Path | None) -> list[str]:
    """A table of accuracies and one of measurements, a row a dataset, where there are any."""
    accuracies: dict[str, dict[str, str]] = {}
    measured: dict[str, dict[str, float]] = {}
    evaluations = _evaluations(folder)
    for label, row in _rows(evaluations, "results.csv", "measurement."):
        setting = f"{row['setting']}_{float(row['n']):.0f}" if row["n"] else row["setting"]
        accuracies.setdefault(label, {})[setting] = format(float(row["accuracy"]), ".2f")
    for label, row in _rows(evaluations, "metrics.csv", "evaluation."):
        if row["value"]:  # empty: undefined
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
            shown[label] = {n.label: n.shown(values) for n in numbers}
        found.append(f"Measured on the evaluated images:\n\n{_table(shown)}")
    return ["## Results", *found] if found else []


def _evaluations(folder: Path | None) -> list[tuple[Path, dict[str, str]]]:
    """The evaluations of an SAE in its store, the newest last, with the settings that decide their
    numbers."""
    from clipsae.overrides import flat  # imports Hydra, to load does not

    found = []
    for place in () if folder is None else (folder.parent.parent / "evaluation").glob("[!.]*"):
        meta = place / "meta.json"
        about = json.loads(meta.read_text()) if meta.is_file() else {}
        key = about.get("key", {})
        if folder is not None and key.get("sae") == folder.name:
            settings = {name: value for name, value in flat(key) if name not in _CHOICES}
            found.append((about.get("finished") or 0, place, settings))
    return [(place, settings) for _, place, settings in sorted(found, key=lambda one: one[:2])]


def _rows(
    evaluations: list[tuple[Path, dict[str, str]]], name: str, idle: str
) -> list[tuple[str, dict[str, str]]]:
    """The rows of the evaluations' CSV files of a name, each with what it was measured on, and with
    those settings that differ between evaluations on the same.

    Args:
        idle: what the names of settings that do not decide these rows begin with.
    """
    found = []
    settings_on: dict[str, list[dict[str, str]]] = {}
    for place, settings in evaluations:
        deciding = {n: value for n, value in settings.items() if not n.startswith(idle)}
        for row in _read(place / name):
            way = ", heldout protocol" if row.get("protocol") == "heldout" else ""
            way += ", ranked by contrast" if row.get("ranking") == "contrast" else ""
            on = f"{row['dataset']} ({row['images']} images{way}"
            settings_on.setdefault(on, []).append(deciding)
            found.append((on, deciding, row))
    differing = {
        on: [n for n in sorted(set().union(*several)) if len({s.get(n) for s in several}) > 1]
        for on, several in settings_on.items()
    }
    return [
        (", ".join([on, *(f"{n}={s[n][:20]}" for n in differing[on] if n in s)]) + ")", row)
        for on, s, row in found
    ]


def _read(path: Path) -> list[dict[str, str]]:
    """A CSV file's rows; none where there is no file."""
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def _table(rows: dict[str, dict[str, str]]) -> str:
    columns = list(dict.fromkeys(name for row in rows.values() for name in row))
    lines = [["dataset", *columns], ["---"] * (len(columns) + 1)]
    lines += [[label, *(row.get(name, "") for name in columns)] for label, row in rows.items()]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)

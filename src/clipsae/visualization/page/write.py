"""Computes the page of one or several dictionaries and writes it: static files, and the data as
scripts.

A page that is opened from disk may not fetch files, but it may load scripts: each piece of data is
a script that passes an object to the page, `clipsae.data("0/latents/3", {...})`, and is loaded when
it is first needed. Columns over all latents are base64 of little-endian arrays; what the pages of
latents show is compressed. What all SAEs share is in `data/meta.js`, what is of the first alone in
`data/0/`.

M latents, K reference images, R sampled images, P patches, C classes.
"""

import base64
import json
import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import permutations
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from clipsae.clip import FrozenCLIP
from clipsae.evaluation.passes import evenly_spaced
from clipsae.naming.names import Names
from clipsae.progress import Bar
from clipsae.sae import SAE
from clipsae.visualization.collector import NAMED
from clipsae.visualization.page.dictionary import by_chance, layout, nearest
from clipsae.visualization.page.images import Effects, ImageActivations, collect_activations
from clipsae.visualization.page.meaning import compressed
from clipsae.visualization.references import BIN_EDGES, References

CHUNK = 64  # latents of a script
MAP_LEVELS = 64  # of a patch in a heat map: one character
ALPHABET = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
_LETTERS = np.frombuffer(ALPHABET.encode(), np.uint8)
THUMBNAIL = 112  # pixels of a side
VIEWS = ("kept", "meaning", "list", "latent", "concepts", "steer", "images", "compare", "map")
ASSETS = ("page.css", "app.js", *(f"{name}.js" for name in VIEWS))
_CLASSES = 5  # that a latent helps, hurts or is kept for
_NEGLIGIBLE = 0.01  # a change of a logit
_TEMPLATE = Path(__file__).parent / "template"


@dataclass(frozen=True)
class Examined:
    """What the page shows of one SAE.

    Attributes:
        about: facts by name, for the page's "About".
        references: of the same images for all SAEs of a page.
        rows: decoder rows, float32 [M, d], on the CPU.
        neighbours: of `dictionary.nearest`.
        effects, images: of `collect_activations`.
        ranking: class -> its latents in the order in which top-n evaluation keeps them, the classes
            that were evaluated alone; None: there was no evaluation.
        names: what its latents are called; None: nobody has named them.
    """

    about: Mapping[str, Any]
    references: References
    rows: Tensor
    neighbours: tuple[Tensor, Tensor]
    effects: Effects | None
    images: list[ImageActivations]
    ranking: Mapping[int, Sequence[int]] | None = None
    names: Names | None = None


@torch.no_grad()
def examine(
    folder: Path,
    clip: FrozenCLIP,
    sae: SAE,
    dataset: Any,
    references: References,
    *,
    about: Mapping[str, Any],
    classifier: Tensor | None = None,
    ranking: Mapping[int, Sequence[int]] | None = None,
    names: Names | None = None,
    pages: int = 200,
    effect_images: int = 4,
    neighbours: int = 8,
    thumbnails: bool = True,
    batch_size: int = 32,
    num_workers: int = 0,
) -> Examined:
    """Compute what the page shows of an SAE, and write the pictures into a folder, which exists.

    Args:
        sae: on the device of `clip`.
        dataset: that the references come from.
        about, ranking, names: see `Examined`.
        classifier: text embeddings [C, e]; None: nothing is predicted.
        pages: images with a page of their own, evenly spaced over the classes.
        effect_images: see `collect_activations`.
        neighbours: nearest latents that are listed.
        thumbnails: False: no pictures of the dataset.
    """
    rows, alive = sae.decoder_rows().detach().float(), references.alive.to(clip.device)
    with_page = evenly_spaced(dataset.labels, pages) if pages else []
    large = set(with_page)

    def on_image(index: int, pixels: Tensor) -> None:
        write_pictures(folder, index, pixels, own_page=index in large)

    with Bar("images and effects of latents") as progress:
        images, effects = collect_activations(
            clip,
            sae,
            dataset,
            classifier,
            references,
            pages=with_page,
            effect_images=effect_images,
            on_image=on_image if thumbnails else None,
            batch_size=batch_size,
            num_workers=num_workers,
            progress=progress,
        )
    with Bar("nearest latents") as progress:
        near = nearest(rows, alive, neighbours, progress=progress)
    return Examined(
        about=about,
        references=references,
        rows=rows.cpu(),
        neighbours=(near[0].cpu(), near[1].cpu()),
        effects=effects,
        images=images,
        ranking=ranking,
        names=names,
    )


def write_pictures(folder: Path, index: int, pixels: Tensor, *, own_page: bool) -> None:
    """Save an image, uint8 [3, S, S], at `THUMBNAIL` pixels a side where it is larger, a thousand
    in a folder; if it has a page of its own, at its own size, too."""
    image = Image.fromarray(pixels.permute(1, 2, 0).numpy())
    small = image
    if max(image.size) > THUMBNAIL:
        small = image.resize((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
    files = [(f"thumbs/{index // 1000}/{index}.jpg", small, 88)]
    if own_page:
        files.append((f"images/{index}.jpg", image, 92))
    for name, picture, quality in files:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.save(path, quality=quality)


def write_page(
    folder: Path,
    models: Mapping[str, Examined],
    *,
    title: str,
    thumbnails: bool,
    names: Sequence[str] | Mapping[int, str] | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Write everything but the pictures.

    Args:
        models: by name, the SAE that is shown first at the first place.
        thumbnails: whether pictures lie in the folder.
        names: of the images, by index; None: they have none but their index.
        progress: called with (scripts written, scripts in all).
    """
    first = next(iter(models.values()))
    source, base = first.references.source, first.references.base
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATE), autoescape=True, keep_trailing_newline=True
    )
    page = environment.get_template("index.html.j2").render(
        title=title, assets=ASSETS, concepts=bool(source.concepts), saes=list(models)
    )
    (folder / "index.html").write_text(page)
    for name in ASSETS:
        (folder / name).write_bytes((_TEMPLATE / name).read_bytes())
    shown = {look.index for look in first.images}
    for one in models.values():
        for index in (one.references.index, one.references.sample_index):
            shown |= set(index[index >= 0].tolist())
    meta = {
        "title": title,
        "saes": [{"name": name, "about": one.about} for name, one in models.items()],
        "chunk": CHUNK,
        "grid": source.grid,
        "images": source.images,
        "classnames": source.classnames,
        "concepts": source.concepts,
        "base": [] if base is None else _significant(base.tolist()),
        "named": NAMED,
        "edges": _significant(BIN_EDGES.tolist()),
        "alphabet": ALPHABET,
        "thumbnails": thumbnails,
        "names": {} if names is None else {index: names[index] for index in sorted(shown)},
        "looks": [
            {"index": i.index, "label": i.label, "said": i.clip[0][0] if i.clip else None}
            for i in first.images
        ],
    }
    _script(folder, "meta", meta)
    done, total = 0, sum(-(-one.references.latents // CHUNK) for one in models.values())
    for at, one in enumerate(models.values()):
        references = one.references
        _script(folder, f"{at}/dictionary", _dictionary(one))
        if one.names is not None:
            _script(folder, f"{at}/meaning", _meaning(one.names))
        roles = _roles(references.latents, one.effects, one.ranking)
        for start in range(0, references.latents, CHUNK):
            chunk: list[dict[str, Any] | None] = []
            for m in range(start, min(start + CHUNK, references.latents)):
                alive = bool(references.alive[m])
                chunk.append(_latent(m, one) | roles[m] if alive else None)
            _script(folder, f"{at}/latents/{start // CHUNK}", _compressed(chunk))
            done += 1
            progress(done, total)
        for image in one.images:
            _script(folder, f"{at}/looks/{image.index}", image_content(image))
    for (at, one), (to, other) in permutations(enumerate(models.values()), 2):
        _script(folder, f"{at}/match{to}", _match(one, other))


def _script(folder: Path, name: str, content: Any) -> None:
    path = folder / "data" / f"{name}.js"
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(content, separators=(",", ":"), allow_nan=False)
    path.write_text(f'clipsae.data("{name}",{text});\n')


def _compressed(content: Any) -> str:
    """Base64 of zlib's compression of JSON: of maps, most of which is 0, a quarter stays."""
    text = json.dumps(content, separators=(",", ":"), allow_nan=False)
    return base64.b64encode(zlib.compress(text.encode(), 9)).decode()


def _leading(references: References) -> list[list[list[float]]]:
    """For each concept its leading latents: [latent, precision]."""
    if references.leading is None:
        return [[] for _ in references.source.concepts]
    concepts = zip(references.leading, references.leading_precision, strict=True)
    return [_pairs(latents[latents >= 0], share[latents >= 0]) for latents, share in concepts]


def _dictionary(one: Examined) -> dict[str, Any]:
    """What all views of an SAE need of its latents."""
    references, names = one.references, one.names
    nothing = torch.full_like(references.top_label, -1)
    nan = torch.full_like(references.frequency, torch.nan)
    helps, gain = _most_helped(references.latents, one.effects)
    places = layout(one.rows, references.alive)
    texts = [] if names is None else sorted({text for text in names.text if text})
    columns = {
        "frequency": references.frequency,
        "tokens": references.token_frequency,
        "strength": references.strength,
        "entropy": references.entropy,
        "monosemanticity": references.monosemanticity,
        "label": references.top_label,
        "concept": nothing if references.concept is None else references.concept,
        "precision": references.concept_precision,
        "certainty": references.concept_score,
        "covered": references.concept_covered,
        "image": references.index[:, 0],
        "helps": helps,
        "gain": gain,
        "x": places[:, 0],
        "y": places[:, 1],
        "name": nothing,
    }
    if names is not None:
        place = {text: i for i, text in enumerate(texts)}
        columns["name"] = torch.tensor([place.get(text, -1) for text in names.text])
        columns |= {key: getattr(names, key) for key in ("score", "low", "high", "control")}
    return {
        "latents": references.latents,
        "leading": _leading(references),
        "names": texts,
        "naming": None
        if names is None
        else {
            **{key: getattr(names, key) for key in ("source", "judge")},
            "threshold": names.threshold,
            "explained": []
            if names.explained is None
            else names.explained.nonzero().squeeze(1).tolist(),
            "words": names.vocabulary.words,
        },
        "columns": {key: _packed(nan if x is None else x) for key, x in columns.items()},
    }


def _packed(values: Tensor) -> list[str]:
    """The type ("f", "i" or "b", of 4, 4 and 1 bytes) and base64 of an array."""
    if values.dtype == torch.int8:
        kind, array = "b", values
    elif values.is_floating_point():
        kind, array = "f", values.float()
    else:
        kind, array = "i", values.int()
    raw = array.cpu().contiguous().numpy()
    return [kind, base64.b64encode(raw.astype(raw.dtype.newbyteorder("<")).tobytes()).decode()]


def _meaning(names: Names) -> dict[str, Any]:
    """The words of the vocabulary and the latents as vectors whose products are cosines."""
    words, latents = compressed(names)
    parts = {"words": words.values, "wordScales": words.scales}
    parts |= {"latents": latents.values, "latentScales": latents.scales}
    return {"size": words.values.shape[1]} | {key: _packed(x) for key, x in parts.items()}


def _match(one: Examined, other: Examined) -> dict[str, Any]:
    """Each latent's counterpart in another SAE: the latent whose decoder row is nearest."""
    alive = other.references.alive
    found, cosine = nearest(one.rows, alive, 1, among=other.rows)
    if not found.shape[1]:
        found, cosine = found.new_full((len(found), 1), -1), cosine.new_zeros(len(found), 1)
    return {
        "latent": _packed(found[:, 0]),
        "cosine": _packed(cosine[:, 0]),
        "chance": round(by_chance(other.rows[alive]), 3),
    }


def _most_helped(latents: int, effects: Effects | None) -> tuple[Tensor, Tensor]:
    """The class that each latent helps most, -1 for none, and by how much, NaN for none; [M]."""
    gain = torch.full((latents,), torch.nan)
    helps = torch.full((latents,), -1)
    if effects is not None:
        order = effects.change.argsort(stable=True)  # of a latent's the largest is written last
        for e in order[effects.change[order] >= _NEGLIGIBLE].tolist():
            helps[effects.latent[e]], gain[effects.latent[e]] = effects.label[e], effects.change[e]
    return helps, gain


def _latent(m: int, one: Examined) -> dict[str, Any]:
    """What the page of a latent shows."""
    references, names = one.references, one.names
    said = {
        **_examples(m, references, ""),
        "range": _examples(m, references, "sample_"),
        "histogram": references.histogram[m].tolist(),
        "near": _pairs(one.neighbours[0][m], one.neighbours[1][m]),
    }
    if names is not None:
        kept = names.best[m] >= 0
        said["words"] = _pairs(names.best[m, kept], names.best_scores[m, kept])
    return said


def _examples(m: int, references: References, kind: str) -> dict[str, Any]:
    """Example images of a latent, of the kind "" or "sample_"."""
    index, label, values, scale, class_token, maps = (
        getattr(references, kind + name)[m]
        for name in ("index", "label", "values", "scale", "class_token", "maps")
    )
    n = int((index >= 0).sum())
    return {
        "images": index[:n].tolist(),
        "labels": label[:n].tolist(),
        "values": _significant(values[:n].tolist()),
        "scales": _significant(scale[:n].tolist()),
        "class": _significant(class_token[:n].tolist()),
        "maps": [heat_text(heat) for heat in maps[:n]],
    }


def _roles(
    latents: int, effects: Effects | None, ranking: Mapping[int, Sequence[int]] | None
) -> list[dict[str, Any]]:
    """What each latent does for classes: those that it helps and hurts, [class, change, images],
    and those that top-n evaluation keeps it for, [class, the smallest n]."""
    found: list[dict[str, Any]] = [{} for _ in range(latents)]
    if effects is not None:
        changes: list[list[list[Any]]] = [[] for _ in range(latents)]
        columns = (effects.latent, effects.label, effects.change, effects.images)
        for m, label, change, images in zip(*(x.tolist() for x in columns), strict=True):
            changes[m].append([label, round(change, 3), images])
        for role, entries in zip(found, changes, strict=True):
            entries.sort(key=lambda entry: -entry[1])
            role["seen"] = sum(images for _, _, images in entries)
            role["helps"] = [e for e in entries[:_CLASSES] if e[1] >= _NEGLIGIBLE]
            role["hurts"] = [e for e in entries[::-1][:_CLASSES] if e[1] <= -_NEGLIGIBLE]
    if ranking is not None:
        kept: list[list[list[int]]] = [[] for _ in range(latents)]
        for label, order in ranking.items():
            for place, m in enumerate(order):
                kept[m].append([label, place + 1])
        for role, places in zip(found, kept, strict=True):
            role["kept"] = sorted(places, key=lambda entry: entry[1])[:_CLASSES]
    return found


def heat_text(heat: Tensor) -> str:
    """A patch map, uint8 [P], as a character a patch: its level 0..63 in `ALPHABET`.

    Only what is 0 has level 0: what is active stays visible.
    """
    levels = (heat.int() * (MAP_LEVELS - 1) + 254) // 255
    return _LETTERS[levels.numpy()].tobytes().decode()


def image_content(image: ImageActivations) -> dict[str, Any]:
    """What the page of an image shows of one SAE, as JSON values."""
    content = asdict(image)
    content["tokens"] = [[latents, _significant(codes)] for latents, codes in image.tokens]
    content["means"] = _significant(image.means)
    content |= {name: _rounded(content[name], 6) for name in ("clip", "sae")}
    if (why := content["why"]) is not None:
        why["means"] = _significant(why["means"])
        for name in ("logits", "normaliser", "without", "normalisers"):
            why[name] = _rounded(why[name], 4)  # differences of them are shown
    return content


def _pairs(keys: Tensor, values: Tensor) -> list[list[float]]:
    return [[i, round(v, 3)] for i, v in zip(keys.tolist(), values.tolist(), strict=True)]


def _rounded(value: Any, digits: int) -> Any:
    if isinstance(value, list | tuple):
        return [_rounded(one, digits) for one in value]
    return round(value, digits)


def _significant(values: list[float]) -> list[float]:
    """Three significant digits, which is what is shown."""
    return [
        v if v == 0 or not math.isfinite(v) else round(v, 2 - math.floor(math.log10(abs(v))))
        for v in values
    ]

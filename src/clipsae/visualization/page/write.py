"""Computes the page and writes it: static files, and the data as scripts.

A page that is opened from disk may not fetch files, but it may load scripts: each piece of data is
a script that passes an object to the page, `clipsae.data("latents/3", {...})`, and is loaded when
it is first needed. Columns over all latents are base64 of little-endian arrays.

M latents, K reference images, P patches, C classes, W words.
"""

import base64
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jinja2
import torch
from PIL import Image
from torch import Tensor

from clipsae.clip import FrozenCLIP
from clipsae.evaluation.passes import evenly_spaced
from clipsae.progress import Bar
from clipsae.sae import SAE
from clipsae.visualization.collector import NAMED
from clipsae.visualization.page.dictionary import Words, best_words, layout, nearest
from clipsae.visualization.page.images import Effects, ImageActivations, collect_activations
from clipsae.visualization.references import BIN_EDGES, References

CHUNK = 64  # latents of a script
MAP_LEVELS = 64  # of a patch in a heat map: one character
ALPHABET = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
THUMBNAIL = 112  # pixels of a side
VIEWS = ("list", "latent", "concepts", "steer", "images", "map")
ASSETS = ("page.css", "app.js", *(f"{name}.js" for name in VIEWS))
_WORDS = 6  # of a latent
_CLASSES = 5  # that a latent helps, hurts or is kept for
_NEGLIGIBLE = 0.01  # a change of a logit
_TEMPLATE = Path(__file__).parent / "template"


@torch.no_grad()
def make_page(
    folder: Path,
    clip: FrozenCLIP,
    sae: SAE,
    dataset: Any,
    references: References,
    *,
    title: str,
    about: Mapping[str, Any],
    classifier: Tensor | None = None,
    words: tuple[list[str], Tensor | None] = ([], None),
    ranking: Mapping[int, Sequence[int]] | None = None,
    names: Sequence[str] | None = None,
    pages: int = 200,
    effect_images: int = 4,
    neighbours: int = 8,
    thumbnails: bool = True,
    batch_size: int = 32,
    num_workers: int = 0,
) -> None:
    """Compute the page of a dictionary and write it into a folder, which exists.

    Args:
        sae: on the device of `clip`.
        dataset: that the references come from.
        about: facts by name, for the page's "About".
        classifier: text embeddings [C, e]; None: nothing is predicted.
        words: W words that latents are compared with, and their embeddings [W, e].
        ranking: class -> its latents in the order in which top-n evaluation keeps them, the classes
            that were evaluated alone; None: there was no evaluation.
        names: the images' files; None: images have no names but their index.
        pages: images with a page of their own, evenly spaced over the classes.
        effect_images: see `collect_activations`.
        neighbours: nearest latents that are listed.
        thumbnails: False: no pictures of the dataset.
    """
    rows, alive = sae.decoder_rows().float(), references.alive.to(clip.device)
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
    shown = sorted({*with_page, *references.index[references.index >= 0].tolist()})
    with Bar("writing the page") as progress:
        write_page(
            folder,
            title=title,
            about=about,
            references=references,
            neighbours=tuple(x.cpu() for x in near),
            places=layout(rows, alive).cpu(),
            words=best_words(clip, rows, *words, n=_WORDS),
            effects=effects,
            ranking=ranking,
            images=images,
            thumbnails=thumbnails,
            names=None if names is None else {index: names[index] for index in shown},
            progress=progress,
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
    *,
    title: str,
    about: Mapping[str, Any],
    references: References,
    neighbours: tuple[Tensor, ...],
    places: Tensor,
    words: Words,
    effects: Effects | None,
    ranking: Mapping[int, Sequence[int]] | None,
    images: list[ImageActivations],
    thumbnails: bool,
    names: Mapping[int, str] | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Write everything but the pictures.

    Args:
        neighbours: of `dictionary.nearest`.
        places: of `dictionary.layout`, [M, 2].
        effects, images: of `collect_activations`.
        thumbnails: whether pictures lie in the folder.
        names: of the images that are shown, by index; None: they have none but their index.
        progress: called with (scripts written, scripts in all).
    """
    source = references.source
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATE), autoescape=True, keep_trailing_newline=True
    )
    page = environment.get_template("index.html.j2").render(
        title=title, assets=ASSETS, concepts=bool(source.concepts)
    )
    (folder / "index.html").write_text(page)
    for name in ASSETS:
        (folder / name).write_bytes((_TEMPLATE / name).read_bytes())
    meta = {
        "title": title,
        "about": about,
        "latents": references.latents,
        "chunk": CHUNK,
        "grid": source.grid,
        "images": source.images,
        "classnames": source.classnames,
        "concepts": source.concepts,
        "base": [] if references.base is None else _significant(references.base.tolist()),
        "named": NAMED,
        "words": words.names,
        "edges": _significant(BIN_EDGES.tolist()),
        "alphabet": ALPHABET,
        "thumbnails": thumbnails,
        "names": names or {},
        "looks": [
            {"index": i.index, "label": i.label, "said": i.clip[0][0] if i.clip else None}
            for i in images
        ],
        "leading": _leading(references),
        "columns": _columns(references, places, words, effects),
    }
    _script(folder, "meta", meta)
    roles = _roles(references.latents, effects, ranking)
    starts = range(0, references.latents, CHUNK)
    for done, start in enumerate(starts):
        chunk: list[dict[str, Any] | None] = []
        for m in range(start, min(start + CHUNK, references.latents)):
            alive = bool(references.alive[m])
            chunk.append(_latent(m, references, neighbours, words) | roles[m] if alive else None)
        _script(folder, f"latents/{start // CHUNK}", chunk)
        progress(done + 1, len(starts))
    for image in images:
        _script(folder, f"looks/{image.index}", _image(image))


def _script(folder: Path, name: str, content: Any) -> None:
    path = folder / "data" / f"{name}.js"
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(content, separators=(",", ":"), allow_nan=False)
    path.write_text(f'clipsae.data("{name}",{text});\n')


def _leading(references: References) -> list[list[list[float]]]:
    """For each concept its leading latents: [latent, precision]."""
    if references.leading is None:
        return [[] for _ in references.source.concepts]
    concepts = zip(references.leading, references.leading_precision, strict=True)
    return [_pairs(latents[latents >= 0], share[latents >= 0]) for latents, share in concepts]


def _columns(
    references: References, places: Tensor, words: Words, effects: Effects | None
) -> dict[str, list[str]]:
    """Name -> type ("f" or "i") and base64 of the array."""
    nothing = torch.full_like(references.top_label, -1)
    nan = torch.full_like(references.frequency, torch.nan)
    helps, gain = _most_helped(references.latents, effects)
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
        "word": words.best[:, 0] if words.best.shape[1] else nothing,
        "helps": helps,
        "gain": gain,
        "x": places[:, 0],
        "y": places[:, 1],
    }
    packed = {}
    for name, column in columns.items():
        values = nan if column is None else column
        kind, array = ("f", values.float()) if values.is_floating_point() else ("i", values.int())
        raw = array.cpu().contiguous().numpy().astype(f"<{kind}4").tobytes()
        packed[name] = [kind, base64.b64encode(raw).decode()]
    return packed


def _most_helped(latents: int, effects: Effects | None) -> tuple[Tensor, Tensor]:
    """The class that each latent helps most, -1 for none, and by how much, NaN for none; [M]."""
    gain = torch.full((latents,), torch.nan)
    helps = torch.full((latents,), -1)
    if effects is not None:
        order = effects.change.argsort(stable=True)  # of a latent's the largest is written last
        for e in order[effects.change[order] >= _NEGLIGIBLE].tolist():
            helps[effects.latent[e]], gain[effects.latent[e]] = effects.label[e], effects.change[e]
    return helps, gain


def _latent(
    m: int, references: References, neighbours: tuple[Tensor, ...], words: Words
) -> dict[str, Any]:
    """What the page of a latent shows."""
    n = int((references.index[m] >= 0).sum())
    return {
        "images": references.index[m, :n].tolist(),
        "labels": references.label[m, :n].tolist(),
        "values": _significant(references.values[m, :n].tolist()),
        "scales": _significant(references.scale[m, :n].tolist()),
        "class": _significant(references.class_token[m, :n].tolist()),
        "maps": [heat_text(heat) for heat in references.maps[m, :n]],
        "histogram": references.histogram[m].tolist(),
        "near": _pairs(neighbours[0][m], neighbours[1][m]),
        "words": _pairs(words.best[m], words.scores[m]),
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
    levels = (heat.long() * (MAP_LEVELS - 1) + 254) // 255
    return "".join(ALPHABET[level] for level in levels.tolist())


def _image(image: ImageActivations) -> dict[str, Any]:
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

"""Writes the page: static files, and the data as scripts.

A page that is opened from disk may not fetch files, but it may load scripts: each piece of data is
a script that hands an object to the page, `clipsae.data("latents/3", {...})`, and is loaded when
it is first needed. Columns over all latents are base64 of little-endian arrays.

M latents, K reference images, P patches, W words.
"""

import base64
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import torch
from PIL import Image
from torch import Tensor

from clipsae.visualization.collector import NAMED
from clipsae.visualization.page.looks import Effects, Look
from clipsae.visualization.page.reasons import Reasons
from clipsae.visualization.references import BIN_EDGES, References

CHUNK = 64  # latents of a script
MAP_LEVELS = 64  # of a patch in a heat map: one character
ALPHABET = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
_CLASSES = 5  # that a latent helps, hurts or is kept for
_NEGLIGIBLE = 0.01  # a change of a logit
THUMBNAIL = 112  # pixels of a side
VIEWS = ("list", "latent", "concepts", "steer", "images", "map")
ASSETS = ("page.css", "app.js", *(f"{name}.js" for name in VIEWS))
_TEMPLATE = Path(__file__).parent / "template"


@dataclass(frozen=True)
class Words:
    """Words that latents are compared with.

    Attributes:
        names: W words.
        best: LongTensor [M, n], the words that each latent's direction aligns with most.
        scores: [M, n], how well.
    """

    names: list[str]
    best: Tensor
    scores: Tensor


def thumbnail_path(index: int) -> str:
    """Where the small picture of an image lies; a folder holds a thousand."""
    return f"thumbs/{index // 1000}/{index}.jpg"


def write_thumbnail(folder: Path, index: int, pixels: Tensor) -> None:
    """Save an image, uint8 [3, S, S], at `THUMBNAIL` pixels a side or its own size."""
    image = Image.fromarray(pixels.permute(1, 2, 0).numpy())
    if max(image.size) > THUMBNAIL:
        image = image.resize((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
    path = folder / thumbnail_path(index)
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, quality=88)


def write_picture(folder: Path, index: int, pixels: Tensor) -> None:
    """Save an image, uint8 [3, S, S], at its own size, for its page."""
    path = folder / "images" / f"{index}.jpg"
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(path, quality=92)


def write_page(
    folder: Path,
    *,
    title: str,
    about: Mapping[str, Any],
    references: References,
    neighbours: tuple[Tensor, Tensor],
    places: Tensor,
    words: Words,
    effects: Effects | None,
    ranking: Mapping[int, Sequence[int]] | None,
    looks: list[Look],
    thumbnails: bool,
    names: Mapping[int, str] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Write everything but the pictures.

    Args:
        folder: exists.
        title: of the page.
        about: what is shown on the page's "about", by name.
        neighbours: of `dictionary.nearest`.
        places: of `dictionary.layout`, [M, 2].
        effects: of `looks.collect_looks`, or None.
        ranking: class -> its latents in the order in which top-n evaluation keeps them, the classes
            that were evaluated alone; None: there was no evaluation.
        thumbnails: whether pictures lie in the folder.
        names: of the images that are shown, by index; None: they have none but their index.
        progress: called with (scripts written, scripts in all).
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATE), autoescape=True, keep_trailing_newline=True
    )
    page = environment.get_template("index.html.j2").render(
        title=title, assets=ASSETS, concepts=bool(references.shown.concepts)
    )
    (folder / "index.html").write_text(page)
    for name in ASSETS:
        (folder / name).write_bytes((_TEMPLATE / name).read_bytes())
    shown = references.shown
    _script(
        folder,
        "meta",
        {
            "title": title,
            "about": about,
            "latents": references.latents,
            "chunk": CHUNK,
            "grid": shown.grid,
            "images": shown.images,
            "classnames": shown.classnames,
            "concepts": shown.concepts,
            "base": [] if references.base is None else _rounded(references.base.tolist()),
            "named": NAMED,
            "words": words.names,
            "edges": _rounded(BIN_EDGES.tolist()),
            "alphabet": ALPHABET,
            "thumbnails": thumbnails,
            "names": names or {},
            "looks": [
                {
                    "index": look.index,
                    "label": look.label,
                    "said": look.clip[0][0] if look.clip else None,
                }
                for look in looks
            ],
            "leading": _leading(references),
            "columns": _columns(references, places, words, effects),
        },
    )
    roles = _roles(references.latents, effects, ranking)
    starts = range(0, references.latents, CHUNK)
    for done, start in enumerate(starts):
        latents = range(start, min(start + CHUNK, references.latents))
        chunk = [_latent(m, references, neighbours, words) for m in latents]
        for m, latent in zip(latents, chunk, strict=True):
            if latent is not None:
                latent |= roles[m]
        _script(folder, f"latents/{start // CHUNK}", chunk)
        if progress is not None:
            progress(done + 1, len(starts))
    for look in looks:
        _script(folder, f"looks/{look.index}", _look(look))


def _script(folder: Path, name: str, content: Any) -> None:
    path = folder / "data" / f"{name}.js"
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(content, separators=(",", ":"), allow_nan=False)
    path.write_text(f'clipsae.data("{name}",{text});\n')


def _leading(references: References) -> list[list[list[float]]]:
    """For each concept its leading latents: [latent, precision]."""
    if references.leading is None:
        return [[] for _ in references.shown.concepts]
    of = zip(references.leading, references.leading_precision, strict=True)
    return [_pairs(latents[latents >= 0], share[latents >= 0]) for latents, share in of]


def _columns(
    references: References, places: Tensor, words: Words, effects: Effects | None
) -> dict[str, list[str]]:
    """Name -> type ("f" or "i") and base64 of the array."""
    nothing = torch.full_like(references.top_label, -1)
    nan = torch.full_like(references.frequency, torch.nan)
    measured = references.monosemanticity
    helps, gain = _most_helped(references.latents, effects)
    has_word = words.best.shape[1] > 0
    columns = {
        "frequency": references.frequency,
        "tokens": references.token_frequency,
        "strength": references.strength,
        "entropy": references.entropy,
        "monosemanticity": nan if measured is None else measured,
        "label": references.top_label,
        "concept": nothing if references.concept is None else references.concept,
        "precision": nan if references.concept is None else references.concept_precision,
        "certainty": nan if references.concept is None else references.concept_score,
        "covered": nan if references.concept is None else references.concept_covered,
        "image": references.index[:, 0],
        "word": words.best[:, 0] if has_word else nothing,
        "helps": helps,
        "gain": gain,
        "x": places[:, 0],
        "y": places[:, 1],
    }
    return {
        name: ["f", _base64(value.float())]
        if value.is_floating_point()
        else ["i", _base64(value.int())]
        for name, value in columns.items()
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


def _base64(values: Tensor) -> str:
    array = values.cpu().contiguous().numpy()
    return base64.b64encode(array.astype(array.dtype.newbyteorder("<")).tobytes()).decode()


def _latent(
    m: int,
    references: References,
    neighbours: tuple[Tensor, Tensor],
    words: Words,
) -> dict[str, Any] | None:
    """What the page of a latent shows; None for one that is never active."""
    if not references.alive[m]:
        return None
    n = int((references.index[m] >= 0).sum())
    return {
        "images": references.index[m, :n].tolist(),
        "labels": references.label[m, :n].tolist(),
        "values": _rounded(references.values[m, :n].tolist()),
        "scales": _rounded(references.scale[m, :n].tolist()),
        "class": _rounded(references.class_token[m, :n].tolist()),
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
        for role, of in zip(found, changes, strict=True):
            of.sort(key=lambda entry: -entry[1])
            role["seen"] = sum(images for _, _, images in of)
            role["helps"] = [e for e in of[:_CLASSES] if e[1] >= _NEGLIGIBLE]
            role["hurts"] = [e for e in of[::-1][:_CLASSES] if e[1] <= -_NEGLIGIBLE]
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


def _look(look: Look) -> dict[str, Any]:
    return {
        "index": look.index,
        "label": look.label,
        "tokens": [[latents, _rounded(codes)] for latents, codes in look.tokens],
        "latents": look.latents,
        "means": _rounded(look.means),
        "clip": [[c, round(p, 6)] for c, p in look.clip],
        "sae": [[c, round(p, 6)] for c, p in look.sae],
        "why": None if look.why is None else _reasons(look.why),
    }


def _reasons(why: Reasons) -> dict[str, Any]:
    """Logits to four digits behind the point: differences of them are shown."""
    return {
        "classes": why.classes,
        "logits": [round(x, 4) for x in why.logits],
        "normaliser": round(why.normaliser, 4),
        "latents": why.latents,
        "means": _rounded(why.means),
        "without": [[round(x, 4) for x in logits] for logits in why.without],
        "normalisers": [round(x, 4) for x in why.normalisers],
        "instead": why.instead,
    }


def _pairs(of: Tensor, values: Tensor) -> list[list[float]]:
    return [[i, round(v, 3)] for i, v in zip(of.tolist(), values.tolist(), strict=True)]


def _rounded(values: list[float]) -> list[float]:
    """Three significant digits, which is what is shown."""
    return [
        v if v == 0 or not math.isfinite(v) else round(v, 2 - math.floor(math.log10(abs(v))))
        for v in values
    ]

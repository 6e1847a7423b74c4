"""What is said about a scene: class names, prompts and captions.

A `Kind` is one way to classify scenes; its templates read well with every one of its class
names ("a photo of an orange object"). A caption states some of a scene's attributes, chosen at
random, so that the words of a caption are true of every scene that `caption_targets` says they
are true of.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from clipsae.data.scenes.world import (
    BACKGROUNDS,
    COLOURS,
    COUNTS,
    PATTERNS,
    POSITIONS,
    SHAPES,
    SIZES,
    Scenes,
    uniforms,
)


def with_article(phrase: str) -> str:
    """`a` or `an`, as the grammar's words need it: an orange star, a red star."""
    return f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}"


@dataclass(frozen=True)
class Template:
    """A prompt: called with a class name. `{}` is the bare name, `{a}` the name with its
    article. A class rather than a lambda, so that data loader workers can pickle it."""

    text: str

    def __call__(self, name: str) -> str:
        return self.text.format(name, a=with_article(name))


@dataclass(frozen=True)
class Kind:
    """One classification of scenes."""

    classnames: tuple[str, ...]
    templates: tuple[Template, ...]
    single: bool = True  # only scenes of one object have an unambiguous label


def _templates(*texts: str) -> tuple[Template, ...]:
    return tuple(Template(t) for t in texts)


_NOUN = _templates("{a}", "a photo of {a}", "a picture of {a}", "an image of {a}")
_ADJECTIVE = _templates(
    "something {}",
    "{a} object",
    "{a} thing",
    "a photo of {a} object",
    "a picture of something {}",
    "an image of {a} thing",
)

KINDS: dict[str, Kind] = {
    "shape": Kind(SHAPES, _NOUN),
    "colour": Kind(tuple(COLOURS), _ADJECTIVE),
    "pattern": Kind(PATTERNS, _ADJECTIVE),
    "size": Kind(SIZES, _ADJECTIVE),
    "shape_colour": Kind(tuple(f"{c} {s}" for s in SHAPES for c in COLOURS), _NOUN),
    "position": Kind(
        POSITIONS,
        _templates(
            "at the {}",
            "something at the {}",
            "an object at the {}",
            "a photo of an object at the {}",
            "a picture of something at the {}",
        ),
    ),
    "background": Kind(
        BACKGROUNDS,
        _templates(
            "{}",
            "a background of {}",
            "a photo of {}",
            "a photo of something against {}",
            "a picture of an object against {}",
            "an image of things against {}",
        ),
        single=False,
    ),
    "count": Kind(
        tuple(f"{n} object{'s' if i else ''}" for i, n in enumerate(COUNTS)),
        _templates("{}", "a photo of {}", "a picture of {}", "an image of {}"),
        single=False,
    ),
}


def kind_labels(kind: str, scenes: Scenes) -> Tensor:
    """The label [N] of each scene, -1 where it has none (several objects)."""
    if kind == "background":
        return scenes.background
    if kind == "count":
        return scenes.count - 1
    if kind == "shape_colour":
        label = scenes.shape[:, 0] * len(COLOURS) + scenes.colour[:, 0]
    else:
        label = getattr(scenes, kind)[:, 0]
    return label.masked_fill(scenes.count > 1, -1)


# --- captions ---

_OPENINGS = ("", "", "a photo of ", "a picture of ", "an image of ")
_NOUNS = ("object", "thing")  # in place of a shape that is not stated
_CAPTION_STREAM = 0x0CA9

# What a caption may state, and how often it does.
STATED = {
    "size": 0.5,
    "colour": 0.85,
    "pattern": 0.6,
    "shape": 0.85,
    "position": 0.3,
    "background": 0.6,
}


@dataclass(frozen=True)
class Captions:
    """Captions of N scenes and what each of them states."""

    texts: list[str]  # N
    stated: Tensor  # [N, len(STATED)] bool; of several objects each is described alike
    counted: Tensor  # [N] bool: "two objects against grass", nothing said of each


def make_captions(scenes: Scenes, seed: int, index: Tensor) -> Captions:
    """One caption for each scene, a pure function of (scene, seed, index).

    Of several objects neither size nor position is stated (they are scaled to fit).
    """
    u = uniforms(seed, _CAPTION_STREAM, index, len(STATED) + 3)
    stated = u[:, : len(STATED)] < torch.tensor(list(STATED.values()))
    several = scenes.count > 1
    names = list(STATED)
    for name in ("size", "position"):
        stated[:, names.index(name)] &= ~several
    counted = several & (u[:, -1] < 0.25)
    stated[counted, : names.index("background")] = False

    # Plain Python from here: some microseconds a caption.
    columns = {n: getattr(scenes, n).tolist() for n in ("size", "colour", "pattern", "shape")}
    words = {"size": SIZES, "colour": tuple(COLOURS), "pattern": PATTERNS, "shape": SHAPES}
    position, background = scenes.position[:, 0].tolist(), scenes.background.tolist()
    count, choice = scenes.count.tolist(), u[:, -3:].tolist()
    texts = []
    for i, says in enumerate(stated.tolist()):
        says = dict(zip(names, says, strict=True))
        noun = _NOUNS[int(choice[i][0] * len(_NOUNS))]
        if count[i] > 1 and choice[i][2] < 0.25:
            what = f"{COUNTS[count[i] - 1]} {noun}s"
        else:
            objects = []
            for slot in range(count[i]):
                phrase = [words[n][columns[n][i][slot]] for n in words if says[n]]
                objects.append(with_article(" ".join(phrase + ([] if says["shape"] else [noun]))))
            what = " and ".join(filter(None, (", ".join(objects[:-1]), objects[-1])))
        text = _OPENINGS[int(choice[i][1] * len(_OPENINGS))] + what
        if says["position"]:
            text += f" at the {POSITIONS[position[i]]}"
        if says["background"]:
            text += f" against {BACKGROUNDS[background[i]]}"
        texts.append(text)
    return Captions(texts, stated, counted)


def caption_targets(scenes: Scenes, captions: Captions) -> tuple[Tensor, Tensor]:
    """Which captions are true of which scenes.

    Returns:
        true [N, N] bool, row: scene, column: caption; and unclear [N, N] bool: pairs that are
        neither right nor wrong (a caption of one object and a scene that holds such an object
        among others), to be left out of a loss.
    """
    says = captions.stated.T[:, None, :]  # [len(STATED), 1, N]
    same_background = scenes.background[:, None] == scenes.background[None, :]
    single = scenes.count == 1

    # Does an object (slot o of scene i) fit what caption j says of the first object of scene j?
    fits = torch.ones(len(scenes), scenes.shape.shape[1], len(scenes), dtype=torch.bool)
    for k, name in enumerate(STATED):
        if name == "background":
            fits &= same_background[:, None, :] | ~says[k]
        else:
            column = getattr(scenes, name)
            fits &= (column[:, :, None] == column[None, None, :, 0]) | ~says[k]
    fits &= (scenes.shape >= 0)[:, :, None]

    true = fits[:, 0] & single[:, None] & single[None, :]
    unclear = fits.any(1) & ~single[:, None] & single[None, :]
    # Captions of several objects: those that only count may be true of others, the rest of
    # their own scene alone (two scenes with all the same objects are too rare to matter).
    same_count = scenes.count[:, None] == scenes.count[None, :]
    background_ok = same_background | ~captions.stated[None, :, list(STATED).index("background")]
    true |= same_count & background_ok & captions.counted[None, :]
    own = torch.eye(len(scenes), dtype=torch.bool)
    return true | own, unclear & ~own


def vocabulary() -> list[str]:
    """Every word of the captions and prompts, and a few that prompts of one's own may want."""
    texts = [t(name) for kind in KINDS.values() for t in kind.templates for name in kind.classnames]
    texts += [*_OPENINGS, *(f"{n} {n}s" for n in _NOUNS), *COUNTS, "and , against at the"]
    texts += [f"{s}{'es' if s.endswith('s') else 's'}" for s in SHAPES]
    texts.append(
        "this is that there are of on in with to my one it its itself no not or image images "
        "photo photos picture pictures scene scenes drawing painting rendering render sketch "
        "shape shapes color colors colour colours pattern patterns size sizes big little tiny "
        "huge gray grey round filled object objects thing things something background grassy "
        "sandy snowy wooden rocky bricks clouds good bad close up cropped bright dark clean "
        "dirty blurry clear large small left right middle centre corner side above below near "
        "red-and-white . ' - "
    )
    words = {w for t in texts for w in t.replace(",", " , ").split()}
    return sorted(words)

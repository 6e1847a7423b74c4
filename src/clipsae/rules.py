"""What a value may be, as a test and in words: the rules that options are checked by."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from clipsae.errors import ConfigError


@dataclass(frozen=True)
class Rule:
    """What a value may be, in words and as a test."""

    expected: str
    holds: Callable[[Any], bool]


def require(
    name: str, value: Any, rule: Rule, hint: str = "", shown: Callable[[Any], str] = repr
) -> None:
    """Refuse an option's value for which the rule does not hold; `hint` ends the message.

    Raises:
        ConfigError: one sentence with the name, the value and what was expected.
    """
    if not rule.holds(value):
        raise ConfigError(f"{name}={shown(value)}: expected {rule.expected}{hint}")


def is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    return is_whole(value) or (isinstance(value, float) and math.isfinite(value))


def whole(least: int | None = None, most: int | None = None, most_name: str = "") -> Rule:
    """A whole number; `most` is the value of the option `most_name`."""
    limits = "" if least is None else f" of at least {least}"
    if most is not None:
        limits = f" from {least} to {most_name}{'=' * bool(most_name)}{most}"
    low, high = (-math.inf if least is None else least), (math.inf if most is None else most)
    return Rule(f"an integer{limits}", lambda v: is_whole(v) and low <= v <= high)


def number(least: float | None = None, above: float | None = None) -> Rule:
    limits = f" of at least {least:g}" if least is not None else ""
    limits += f" above {above:g}" if above is not None else ""
    return Rule(
        f"a number{limits}",
        lambda v: is_number(v) and (least is None or v >= least) and (above is None or v > above),
    )


def share(expected: str, *, zero: bool = True, one: bool = True) -> Rule:
    """A number from 0 to 1, with or without these; `expected` says so."""
    return Rule(
        expected, lambda v: is_number(v) and 0 <= v <= 1 and (zero or v > 0) and (one or v < 1)
    )


def one_of(*choices: Any) -> Rule:
    said = [str(choice).lower() if isinstance(choice, bool) else str(choice) for choice in choices]
    words = list(dict.fromkeys(said))
    # By type, too: 1 is not true.
    return Rule(
        f"{', '.join(words[:-1])} or {words[-1]}",
        lambda v: any(v == choice and type(v) is type(choice) for choice in choices),
    )


def or_null(rule: Rule) -> Rule:
    return Rule(f"{rule.expected}, or null", lambda v: v is None or rule.holds(v))


def either(one: Rule, other: Rule) -> Rule:
    return Rule(f"{one.expected}, or {other.expected}", lambda v: one.holds(v) or other.holds(v))


def list_of(rule: Rule, least: int = 0, most: float = math.inf) -> Rule:
    size = f" of {least}" if least == most else f" of at least {least}" if least else ""
    return Rule(
        f"a list{size}, each {rule.expected}",
        lambda v: isinstance(v, list) and least <= len(v) <= most and all(map(rule.holds, v)),
    )


def unset(instead: str) -> Rule:
    """A key that is not to be set."""
    return Rule(f"null: {instead}", lambda v: v is None)


FLAG = one_of(True, False)
TEXT = Rule("text", lambda v: isinstance(v, str) and v != "")
NAME = Rule("a name", lambda v: isinstance(v, str | int) and not isinstance(v, bool) and v != "")


CLIP_PRECISION = one_of("fp32", "bf16-mixed")
# The values of `precision` beside auto, and what keys of the store say in their place: of the
# tokens, and of an SAE's training.
PRECISIONS = {
    "float32": ("fp32", "32-true"),
    "tf32": ("bf16-mixed", "tf32"),
    "bf16": ("bf16-mixed", "bf16-mixed"),
}
EMBEDDINGS = ("embedding", "towers")  # hooks behind all blocks: of no layer, and without patches
HOOKS = ("resid", "attn_out", "mlp_out", *EMBEDDINGS)  # where in a block or behind it the SAE reads
TOKENS = one_of("all", "patches", "cls")  # of an image, that an SAE is of
NORM_RATIO = or_null(number(least=1))  # above which a token's norm, in medians, leaves it out


def where(layer: int, hook: str = "resid") -> str:
    """Where in the tower an SAE reads, in words."""
    if hook == "embedding":
        return "image embedding"
    if hook == "towers":
        return "image and caption embeddings"
    return f"layer {layer}" + f", {hook}" * (hook != "resid")


CLIP = {  # of `FrozenCLIP.load` and conf/clip
    "name": TEXT,
    "pretrained": or_null(TEXT),
    "layer": whole(),
    "hook": one_of(*HOOKS),
    "seed": whole(0),
    "image_size": or_null(whole(1)),
}


def similar(word: Any, names: Iterable[str]) -> list[str]:
    """The names that may be meant by a word, at most three."""
    names = list(names)
    # (l1: l1_coefficient)
    longer = [name for name in names if name.startswith(f"{word}_")]
    return longer[:3] or get_close_matches(str(word), names)


def near(word: Any, names: Iterable[str]) -> str:
    """ " (did you mean NAME?)" where a name resembles the word, else nothing."""
    found = similar(word, names)
    return f" (did you mean {found[0]}?)" if found else ""


def check_layer(name: str, layer: int, blocks: int, option: str = "clip.layer") -> None:
    """Refuse a block that the model does not have.

    Args:
        option: whose value the layer is.

    Raises:
        ConfigError: as it says.
    """
    if not -blocks <= layer < blocks:
        raise ConfigError(
            f"{option}={layer}: {name} has {blocks} blocks, so expected {-blocks}..{-1} "
            f"(from the end) or 0..{blocks - 1}"
        )


def check_layers(hook: str, layers: Iterable[int]) -> None:
    """Refuse several layers where they make no difference.

    Raises:
        ConfigError: several layers of the hooks "embedding" and "towers".
    """
    if hook in EMBEDDINGS and len(set(layers)) > 1:
        raise ConfigError(
            f"clip.hook={hook}: the image embedding is the same for every layer, so there is "
            "nothing to read at several or to write at another: give one clip.layer, and "
            "model.target_layer=null"
        )

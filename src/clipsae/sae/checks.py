"""Each raises ValueError where an option is not what it must be, in a sentence that names it."""

from collections.abc import Iterable
from typing import Any

from clipsae import rules
from clipsae.rules import near, require


def whole(name: str, value: Any, least: int = 1, most: int | None = None, of: str = "") -> None:
    """A whole number from `least` to `most`, which is called `of` in the message."""
    require(name, value, rules.whole(least, most, of))


def not_negative(name: str, value: Any) -> None:
    require(name, value, rules.number(least=0))


def positive(name: str, value: Any, other: str = "") -> None:
    """A number > 0; `other` ends the message: what it may be besides."""
    require(name, value, rules.number(above=0), other)


def fraction(name: str, value: Any, expected: str, *, zero: bool, one: bool) -> None:
    """A number from 0 to 1, with or without these; `expected` says so."""
    require(name, value, rules.share(expected, zero=zero, one=one))


def boolean(name: str, value: Any) -> None:
    require(name, value, rules.FLAG)


def one_of(name: str, value: Any, allowed: Iterable[str]) -> None:
    allowed = tuple(allowed)
    rule = rules.Rule(f"one of {', '.join(allowed)}", lambda v: v in allowed)
    require(name, value, rule, near(value, allowed))

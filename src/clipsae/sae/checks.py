"""Checks of options: a wrong value is refused in a sentence that names it and what is expected."""

from collections.abc import Iterable
from typing import Any

from clipsae import rules
from clipsae.rules import near, require


def whole(
    name: str, value: Any, least: int = 1, most: int | None = None, most_name: str = ""
) -> None:
    """Raises ValueError unless value is a whole number from `least` to `most`, an option of the
    name `most_name`."""
    require(name, value, rules.whole(least, most, most_name))


def not_negative(name: str, value: Any) -> None:
    """Raises ValueError unless value is a number >= 0."""
    require(name, value, rules.number(least=0))


def positive(name: str, value: Any, other: str = "") -> None:
    """Raises ValueError unless value is a number > 0; `other`: what else is allowed, for the
    message."""
    require(name, value, rules.number(above=0), other)


def fraction(name: str, value: Any, expected: str, *, zero: bool, one: bool) -> None:
    """Raises ValueError unless value is a number from 0 to 1; `zero`, `one`: whether it may be
    these."""
    require(name, value, rules.share(expected, zero=zero, one=one))


def boolean(name: str, value: Any) -> None:
    """Raises ValueError unless value is true or false."""
    require(name, value, rules.FLAG)


def one_of(name: str, value: Any, allowed: Iterable[str]) -> None:
    """Raises ValueError unless value is among `allowed`."""
    allowed = tuple(allowed)
    rule = rules.Rule(f"one of {', '.join(allowed)}", lambda v: v in allowed)
    require(name, value, rule, near(value, allowed))

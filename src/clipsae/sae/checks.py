"""Checks of options: each raises a ValueError that names the value and what is expected."""

from collections.abc import Iterable
from typing import Any

from clipsae import rules
from clipsae.rules import near, require


def whole(
    name: str, value: Any, least: int = 1, most: int | None = None, most_name: str = ""
) -> None:
    """A whole number from `least` to `most`, which is the value of the option `most_name`."""
    require(name, value, rules.whole(least, most, most_name))


def not_negative(name: str, value: Any) -> None:
    """A number >= 0."""
    require(name, value, rules.number(least=0))


def positive(name: str, value: Any, other: str = "") -> None:
    """A number > 0; `other`: what else is allowed, for the message."""
    require(name, value, rules.number(above=0), other)


def fraction(name: str, value: Any, expected: str, *, zero: bool, one: bool) -> None:
    """A number from 0 to 1; `zero`, `one`: whether it may be these."""
    require(name, value, rules.share(expected, zero=zero, one=one))


def boolean(name: str, value: Any) -> None:
    """True or false."""
    require(name, value, rules.FLAG)


def one_of(name: str, value: Any, allowed: Iterable[str]) -> None:
    """One of `allowed`."""
    allowed = tuple(allowed)
    rule = rules.Rule(f"one of {', '.join(allowed)}", lambda v: v in allowed)
    require(name, value, rule, near(value, allowed))

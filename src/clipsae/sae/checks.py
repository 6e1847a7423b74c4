"""Checks of options: a wrong value is refused in a sentence that names it and what is expected."""

import math
from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any


def _require(fits: bool, name: str, value: Any, expected: str) -> None:
    if not fits:
        raise ValueError(f"{name}={value!r}: expected {expected}")


def _finite(value: Any) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and math.isfinite(value)


def whole(
    name: str, value: Any, least: int = 1, most: int | None = None, most_name: str = ""
) -> None:
    """Raises ValueError unless value is a whole number from `least` to `most`, an option of the
    name `most_name`."""
    fits = isinstance(value, int) and not isinstance(value, bool) and value >= least
    fits = fits and (most is None or value <= most)
    limits = f", {least} or more" if most is None else f" from {least} to {most_name}={most}"
    _require(fits, name, value, f"a whole number{limits}")


def not_negative(name: str, value: Any) -> None:
    """Raises ValueError unless value is a number >= 0."""
    _require(_finite(value) and value >= 0, name, value, "a number, 0 or more")


def positive(name: str, value: Any, other: str = "") -> None:
    """Raises ValueError unless value is a number > 0; `other`: what else is allowed, for the
    message."""
    _require(_finite(value) and value > 0, name, value, f"a number above 0{other}")


def fraction(name: str, value: Any, expected: str, *, zero: bool, one: bool) -> None:
    """Raises ValueError unless value is a number from 0 to 1; `zero`, `one`: whether it may be
    these."""
    fits = _finite(value) and 0 <= value <= 1 and (zero or value > 0) and (one or value < 1)
    _require(fits, name, value, expected)


def boolean(name: str, value: Any) -> None:
    """Raises ValueError unless value is true or false."""
    _require(isinstance(value, bool), name, value, "true or false")


def one_of(name: str, value: Any, allowed: Iterable[str]) -> None:
    """Raises ValueError unless value is among `allowed`."""
    allowed = tuple(allowed)
    expected = f"one of {', '.join(allowed)}{near(value, allowed)}"
    _require(value in allowed, name, value, expected)


def near(word: Any, names: Iterable[str]) -> str:
    """ " (did you mean NAME?)" where a name resembles the word, else nothing."""
    found = get_close_matches(str(word), list(names), n=1)
    return f" (did you mean {found[0]}?)" if found else ""

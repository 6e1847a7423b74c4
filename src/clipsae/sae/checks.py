"""Options as they must be: what cannot be is refused in a sentence that names it."""

import math
from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any


def whole(name: str, value: Any, least: int = 1, most: int | None = None, of: str = "") -> None:
    """Raises ValueError unless value is a whole number from `least` to `most`.

    Args:
        of: what `most` is, for the message.
    """
    fits = isinstance(value, int) and not isinstance(value, bool) and value >= least
    if not fits or (most is not None and value > most):
        limits = f", {least} or more" if most is None else f" from {least} to {of}{most}"
        raise ValueError(f"{name}={value!r}: expected a whole number{limits}")


def not_negative(name: str, value: Any) -> None:
    """Raises ValueError unless value is a number >= 0."""
    if not _finite(value) or value < 0:
        raise ValueError(f"{name}={value!r}: expected a number, 0 or more")


def positive(name: str, value: Any, other: str = "") -> None:
    """Raises ValueError unless value is a number > 0.

    Args:
        other: what it may be besides, for the message.
    """
    if not _finite(value) or value <= 0:
        raise ValueError(f"{name}={value!r}: expected a number above 0{other}")


def fraction(name: str, value: Any, expected: str, *, zero: bool, one: bool) -> None:
    """Raises ValueError unless value is a number from 0 to 1.

    Args:
        expected: for the message.
        zero, one: whether it may be these.
    """
    fits = _finite(value) and 0 <= value <= 1 and (zero or value > 0) and (one or value < 1)
    if not fits:
        raise ValueError(f"{name}={value!r}: expected {expected}")


def boolean(name: str, value: Any) -> None:
    """Raises ValueError unless value is true or false."""
    if not isinstance(value, bool):
        raise ValueError(f"{name}={value!r}: expected true or false")


def one_of(name: str, value: Any, allowed: Iterable[str]) -> None:
    """Raises ValueError unless value is among `allowed`."""
    allowed = tuple(allowed)
    if value not in allowed:
        raise ValueError(
            f"{name}={value!r}: expected one of {', '.join(allowed)}{near(value, allowed)}"
        )


def near(word: Any, names: Iterable[str]) -> str:
    """ " (did you mean NAME?)" where a name resembles the word, else nothing."""
    found = get_close_matches(str(word), list(names), n=1)
    return f" (did you mean {found[0]}?)" if found else ""


def _finite(value: Any) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and math.isfinite(value)

"""Arguments as a person writes them: memory budgets, whole numbers, flags, words of a few."""

from __future__ import annotations

import operator
import re
import reprlib
from collections.abc import Iterable
from typing import Any, overload

from microtome.errors import DtypeError, ShapeError

__all__ = [
    "LARGEST",
    "LARGEST_SEED",
    "MOST_RESAMPLES",
    "flag",
    "parse_bytes",
    "require_one_of",
    "required_bytes",
    "whole",
]

LARGEST = 2**63 - 1
"""Largest whole number that is taken unless told otherwise: that of a signed 64-bit word."""

LARGEST_SEED = 2**64 - 1
"""Largest seed of a generator of the core."""

MOST_RESAMPLES = 10**6
"""Repetitions that an interval is taken from, at most."""

_UNITS = {
    "": 1,
    "B": 1,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
    "TIB": 2**40,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
}


@overload
def parse_bytes(budget: int | str) -> int: ...
@overload
def parse_bytes(budget: int | str | None) -> int | None: ...
def parse_bytes(budget: int | str | None) -> int | None:
    """``"2GiB"``, ``"500 MB"`` or a number as bytes; None where None.

    Example:
        >>> parse_bytes("1.5 KiB")
        1536

    Raises:
        ShapeError: not a number of bytes or a size in text, or not positive.
    """
    return None if budget is None else required_bytes(budget)


def required_bytes(budget: int | str) -> int:
    """As :func:`parse_bytes`, where there has to be a budget."""
    if isinstance(budget, str):
        found = re.fullmatch(r"\s*(\d+\.?\d*|\.\d+)\s*([KMGT]?I?B?)\s*", budget.upper())
        if not found or found[2] not in _UNITS:
            raise ShapeError(f"memory_budget: expected bytes or text such as '2GiB', found {budget!r}")
        budget = int(float(found[1]) * _UNITS[found[2]])
    number = _index(budget)
    if number is None:
        raise ShapeError(f"memory_budget: expected bytes or text such as '2GiB', found {_shown(budget)}")
    if number <= 0:
        raise ShapeError(f"memory_budget: expected more than 0 bytes, found {number}")
    if number > LARGEST:
        raise ShapeError(f"memory_budget: expected at most {LARGEST} bytes, found {number}")
    return number


def whole(value: Any, name: str, least: int = 0, most: int = LARGEST) -> int:
    """``value`` as a whole number from ``least`` to ``most``; those of NumPy are welcome, bools are not.

    Example:
        >>> whole(3, "replicates", least=2)
        3

    Raises:
        ShapeError: not a whole number, or one outside the bounds.
    """
    number = _index(value)
    if number is None or number < least:
        raise ShapeError(f"{name}: expected a whole number of at least {least}, found {_shown(value)}")
    if number > most:
        raise ShapeError(f"{name}: expected a whole number of at most {most}, found {number}")
    return number


def flag(value: Any, name: str) -> bool:
    """``value`` as a bool, of Python or of NumPy.

    Raises:
        DtypeError: anything else.
    """
    if type(value).__name__ not in ("bool", "bool_"):
        raise DtypeError(f"{name}: expected True or False, found {_shown(value)}")
    return bool(value)


def require_one_of(
    name: str, value: Any, allowed: Iterable[Any], error: type[Exception] = ShapeError
) -> None:
    """Refuse an option that there is not: a misspelt one is never taken as another.

    Raises:
        ShapeError: ``value`` is not among ``allowed``; or another error that is asked for.

    Example:
        >>> require_one_of("align", "spams", ("absolute", "spans"))
        Traceback (most recent call last):
        microtome.errors.ShapeError: align: expected one of absolute, spans, found 'spams'
    """
    options = tuple(allowed)
    if not any(value is option or (isinstance(value, str) and value == option) for option in options):
        raise error(f"{name}: expected one of {', '.join(map(str, options))}, found {value!r}")


def _index(value: Any) -> int | None:
    """The whole number that ``value`` stands for; None where it stands for none."""
    try:
        return None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        return None


def _shown(value: Any) -> str:
    """A value in a message: short, and on one line."""
    return " ".join(reprlib.repr(value).split())

"""Fields of a configuration, checked when it is made: one of some words, a whole number, a number within bounds."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from numbers import Integral, Real
from typing import Any, NamedTuple, get_args

from microtome.arguments import require_one_of
from microtome.errors import ShapeError

__all__ = ["Bounds", "check_flags", "check_numbers", "check_whole", "check_words"]


class Bounds(NamedTuple):
    """An interval of numbers; infinity is never in it."""

    low: float
    high: float = math.inf
    with_low: bool = False
    with_high: bool = False

    def __contains__(self, value: object) -> bool:
        if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
            return False
        number = float(value)
        above = number >= self.low if self.with_low else number > self.low
        return above and (number <= self.high if self.with_high else number < self.high)

    def __str__(self) -> str:
        return f"{'[' if self.with_low else '('}{self.low:g}, {self.high:g}{']' if self.with_high else ')'}"


def check_words(config: Any, words: Mapping[str, Any], error: type[Exception] = ShapeError) -> None:
    """Refuse fields that are none of the words of their ``Literal``."""
    for name, kind in words.items():
        require_one_of(name, getattr(config, name), get_args(kind), error)


def check_whole(config: Any, names: Iterable[str], least: int = 1) -> None:
    """Refuse fields that are neither their default None nor whole numbers of at least ``least``."""
    for name in names:
        value = getattr(config, name)
        if value is None and _may_be_none(config, name):
            continue
        if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
            raise ShapeError(f"{name}: expected a whole number of at least {least}, found {value!r}")
        object.__setattr__(config, name, int(value))  # NumPy's would not go into the JSON of a checkpoint


def check_numbers(config: Any, bounds: Mapping[str, Bounds]) -> None:
    """Refuse fields that are neither their default None nor finite numbers within their bounds."""
    for name, within in bounds.items():
        value = getattr(config, name)
        if value not in within and not (value is None and _may_be_none(config, name)):
            raise ShapeError(f"{name}: expected a number in {within}, found {value!r}")


def check_flags(config: Any, names: Iterable[str]) -> None:
    """Refuse fields that are neither True nor False."""
    for name in names:
        if not isinstance(value := getattr(config, name), bool):
            raise ShapeError(f"{name}: expected True or False, found {value!r}")


def _may_be_none(config: Any, name: str) -> bool:
    return next(field.default is None for field in dataclasses.fields(config) if field.name == name)

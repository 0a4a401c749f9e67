"""Options that are one of a few words: a misspelt one is refused, never taken as another."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from microtome.errors import ShapeError

__all__ = ["require_one_of"]


def require_one_of(name: str, value: Any, allowed: Iterable[Any]) -> None:
    """Refuse an option that there is not.

    Raises:
        ShapeError: ``value`` is not among ``allowed``.

    Example:
        >>> require_one_of("align", "spams", ("absolute", "spans"))
        Traceback (most recent call last):
        microtome.errors.ShapeError: align: expected one of absolute, spans, found 'spams'
    """
    options = tuple(allowed)
    if not any(value is option or (isinstance(value, str) and value == option) for option in options):
        raise ShapeError(f"{name}: expected one of {', '.join(map(str, options))}, found {value!r}")

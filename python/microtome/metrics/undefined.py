"""Numbers that do not exist: NaN, and said so."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

from microtome.errors import UndefinedWarning

__all__ = ["warn_undefined"]

_SHOWN = 10


def warn_undefined(what: str, reason: str, names: Sequence[str], stacklevel: int = 3) -> None:
    """Warn which numbers are NaN and why; by default at the caller of the function that calls this one."""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    message = f"{what} is undefined (NaN) for {', '.join(names[:_SHOWN])}{more}: {reason}"
    warnings.warn(message, UndefinedWarning, stacklevel=stacklevel)

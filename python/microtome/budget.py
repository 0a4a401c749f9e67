"""Memory budgets as a person writes them."""

from __future__ import annotations

import re

from microtome.errors import ShapeError

__all__ = ["parse_bytes"]

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


def parse_bytes(budget: int | str | None) -> int | None:
    """``"2GiB"``, ``"500 MB"`` or a number as bytes.

    Example:
        >>> parse_bytes("1.5 KiB")
        1536

    Raises:
        ShapeError: the text is not a size, or not positive.
    """
    if budget is None:
        return None
    if isinstance(budget, str):
        found = re.fullmatch(r"\s*([0-9.]+)\s*([KMGT]?I?B?)\s*", budget.upper())
        if not found or found[2] not in _UNITS:
            raise ShapeError(f"memory_budget: expected bytes or text such as '2GiB', found {budget!r}")
        budget = int(float(found[1]) * _UNITS[found[2]])
    if budget <= 0:
        raise ShapeError(f"memory_budget: expected more than 0 bytes, found {budget}")
    return budget

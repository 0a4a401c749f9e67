"""Which rows somebody asked for: a slice, row numbers or a mask; and blocks of so many."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from microtome.errors import ShapeError

__all__ = ["block_starts", "places", "run_of"]


def run_of(rows: Any, n: int) -> tuple[int, int] | None:
    """The places ``start..stop`` of ``0..n`` that a slice asks for, side by side; None for all else."""
    if not isinstance(rows, slice) or rows.step not in (None, 1):
        return None
    start, stop, _ = rows.indices(n)
    return start, max(start, stop)


def block_starts(n_rows: int, n: int) -> range:
    """Where blocks of ``n`` of ``n_rows`` rows begin.

    Raises:
        ShapeError: fewer than 1 row per block.
    """
    if n < 1:
        raise ShapeError(f"n: expected at least 1 row per block, found {n}")
    return range(0, n_rows, n)


def places(rows: Any, n: int) -> npt.NDArray[np.uint64]:
    """Row numbers, a slice or a mask as places in ``0..n``.

    Raises:
        ShapeError: out of range, or a mask of another length.
    """
    if isinstance(rows, slice):
        return np.arange(*rows.indices(n), dtype=np.int64).astype(np.uint64)
    values = np.atleast_1d(np.asarray(rows))
    if values.ndim != 1 or (values.size and values.dtype.kind not in "iub"):
        raise ShapeError(
            f"rows: expected a slice, row numbers or a mask, found {values.dtype} {values.shape}"
        )
    if values.dtype.kind == "b":
        if len(values) != n:
            raise ShapeError(f"rows: expected a mask of {n} rows, found {len(values)}")
        return np.flatnonzero(values).astype(np.uint64)
    wrong = (values >= n) | (values < -n) if values.dtype.kind == "i" else values >= n
    if wrong.any():
        raise ShapeError(f"rows: expected numbers below {n}, found {values[wrong][0]}")
    if values.dtype.kind == "i":
        values = values.astype(np.int64)
        values = np.where(values < 0, values + n, values)
    return np.ascontiguousarray(values.astype(np.uint64))

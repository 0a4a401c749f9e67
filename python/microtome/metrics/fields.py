"""Fields of sparse codes as arrays of the core's types, in host memory.

Fields may be tensors of any device, with a gradient or without; integers of any width; floats of any precision. Nothing is
copied that has the right type already.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from microtome.errors import DtypeError, ShapeError

__all__ = ["activations", "feature_numbers", "row_bounds"]


def feature_numbers(indices: Any, d_sae: int, name: str = "indices") -> npt.NDArray[np.uint32]:
    """Features as the core numbers them.

    Raises:
        DtypeError: not integers.
        ShapeError: a number that no feature has.
    """
    found = _integers(indices, name)
    if found.dtype != np.uint32 and found.size:
        low, high = int(found.min()), int(found.max())
        if low < 0 or high > np.iinfo(np.uint32).max:
            wrong = low if low < 0 else high
            raise ShapeError(f"{name}: expected features from 0 to {d_sae - 1}, found {wrong}")
    return found.astype(np.uint32, copy=False)


def activations(values: Any, name: str = "values") -> npt.NDArray[np.float32]:
    """Activations in float32.

    Raises:
        DtypeError: not floating point.
    """
    found = _host(values)
    if found.dtype.kind != "f":
        raise DtypeError(f"{name}: expected float32, found {found.dtype}")
    return found.astype(np.float32, copy=False)


def row_bounds(indptr: Any, name: str = "indptr") -> npt.NDArray[np.int64]:
    """Where rows begin and end.

    Raises:
        DtypeError: not integers.
    """
    return _integers(indptr, name).astype(np.int64, copy=False)


def _integers(values: Any, name: str) -> npt.NDArray[Any]:
    found = _host(values)
    if found.dtype.kind not in "iu":
        raise DtypeError(f"{name}: expected integers, found {found.dtype}")
    return found


def _host(values: Any) -> npt.NDArray[Any]:
    if hasattr(values, "detach"):  # a torch tensor
        values = values.detach().cpu()
        values = values.float() if values.is_floating_point() else values
        return values.numpy()  # type: ignore[no-any-return]
    return np.asarray(values)

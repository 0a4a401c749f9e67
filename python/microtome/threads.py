"""Threads of the core's own pool."""

from __future__ import annotations

from microtome import _core
from microtome.arguments import whole

__all__ = ["set_num_threads"]

_MOST = 4096


def set_num_threads(n: int) -> None:
    """Sets the number of threads of microtome's own pool; 0 means one per core.

    Raises:
        ShapeError: ``n`` is not a whole number from 0 to 4096.
    """
    _core.set_num_threads(whole(n, "n", most=_MOST))

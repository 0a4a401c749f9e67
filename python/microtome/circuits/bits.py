"""Bitsets in NumPy, and the top n of a long score array.

Bit i is bit ``i % 8`` of byte ``i // 8``; bits past the end are zero.
"""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
import numpy.typing as npt

__all__ = ["Bits", "pack", "popcount", "random_bits", "top_n_bits", "unpack"]

Bits: TypeAlias = npt.NDArray[np.uint8]


def pack(mask: npt.NDArray[np.bool_]) -> Bits:
    """Booleans of any shape as bits, in C order."""
    return np.packbits(mask.reshape(-1), bitorder="little")


def unpack(bits: Bits, n: int) -> npt.NDArray[np.bool_]:
    """The first ``n`` bits as booleans."""
    return np.unpackbits(bits, count=n, bitorder="little").view(np.bool_)


def popcount(bits: Bits) -> int:
    """Number of set bits."""
    return int(np.bitwise_count(bits).sum(dtype=np.int64))


def random_bits(n: int, n_set: int, rng: np.random.Generator) -> Bits:
    """``n_set`` of ``n`` bits, drawn uniformly without replacement."""
    mask = np.zeros(n, bool)
    mask[rng.choice(n, n_set, replace=False)] = True
    return pack(mask)


def top_n_bits(scores: npt.NDArray[np.float32], n: int) -> Bits:
    """The ``n`` largest of ``scores`` (any shape, C order); ties go to the lower index, NaN is below everything."""
    flat = scores.reshape(-1)
    if n <= 0:
        return pack(np.zeros(flat.size, bool))
    if n >= flat.size:
        return pack(np.ones(flat.size, bool))
    values = np.where(np.isnan(flat), -np.inf, flat) if np.isnan(flat).any() else flat
    threshold = np.partition(values, flat.size - n)[flat.size - n]
    chosen = values > threshold
    chosen[np.flatnonzero(values == threshold)[: n - int(chosen.sum())]] = True
    return pack(chosen)

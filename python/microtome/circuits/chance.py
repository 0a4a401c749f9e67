"""The exact chance level of IoU: its expectation for two random sets of given sizes."""

from __future__ import annotations

import math

import numpy as np

from microtome.errors import ShapeError

__all__ = ["expected_iou"]


def expected_iou(n: int, size_a: int, size_b: int) -> float:
    """E |A ∩ B| / |A ∪ B| for sets drawn uniformly from ``n`` nodes.

    The intersection i is hypergeometric, so the value is Σ P(i) · i / (a + b - i), summed where P is not
    negligible.

    Args:
        n: nodes there are.
        size_a: nodes of the one set.
        size_b: nodes of the other.

    Returns:
        The expected IoU; 1 for two empty sets.

    Raises:
        ShapeError: a size is negative or larger than ``n``.

    Example:
        >>> round(expected_iou(6, 6, 2), 6)
        0.333333
    """
    if not (0 <= size_a <= n and 0 <= size_b <= n):
        raise ShapeError(f"expected_iou: expected sizes from 0 to n={n}, found {size_a} and {size_b}")
    if size_a == size_b == 0:
        return 1.0
    least, most = max(0, size_a + size_b - n), min(size_a, size_b)
    mean = size_a * size_b / n
    variance = mean * (n - size_a) * (n - size_b) / (n * max(n - 1, 1))
    reach = int(12 * math.sqrt(variance)) + 50
    first, last = max(least, int(mean) - reach), min(most, int(mean) + reach)
    i = np.arange(first, last + 1, dtype=np.float64)
    ratios = (size_a - i[:-1]) * (size_b - i[:-1]) / ((i[:-1] + 1) * (n - size_a - size_b + i[:-1] + 1))
    logs = np.concatenate([[0.0], np.cumsum(np.log(ratios))])
    weights = np.exp(logs - logs.max())
    return float((weights * i / (size_a + size_b - i)).sum() / weights.sum())

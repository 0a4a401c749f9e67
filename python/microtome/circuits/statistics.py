"""Bootstrap intervals and McNemar's test, seeded and exact."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import comb
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from microtome.errors import ShapeError

__all__ = ["Interval", "bootstrap", "mcnemar"]

Vector = npt.NDArray[np.float64]


class Interval(NamedTuple):
    """A value with its bootstrap interval."""

    value: float
    low: float
    high: float


def bootstrap(
    statistic: Callable[..., float],
    samples: Sequence[Vector],
    n_resamples: int = 1000,
    seed: int = 0,
    level: float = 0.95,
) -> Interval:
    """Percentile interval of ``statistic(*samples)``, the rows of all samples resampled together.

    Args:
        statistic: of vectors of one length.
        samples: vectors of one length, paired row by row.
        n_resamples: draws.
        seed: of the draws.
        level: share of the draws inside the interval.

    Returns:
        The statistic and its interval; NaN for no rows.

    Raises:
        ShapeError: samples of different lengths, or a level outside 0 to 1.

    Example:
        >>> import numpy as np
        >>> bootstrap(lambda x: float(x.mean()), [np.ones(5)]) Interval(value=1.0, low=1.0, high=1.0)
    """
    n = len(samples[0])
    if any(len(sample) != n for sample in samples):
        raise ShapeError(f"bootstrap: expected samples of one length, found {[len(s) for s in samples]}")
    if not 0 < level < 1:
        raise ShapeError(f"bootstrap: level: expected a share between 0 and 1, found {level}")
    if n == 0:
        return Interval(float("nan"), float("nan"), float("nan"))
    rng = np.random.default_rng(seed)
    draws = np.empty(n_resamples)
    for i in range(n_resamples):
        rows = rng.integers(n, size=n)
        draws[i] = statistic(*(sample[rows] for sample in samples))
    finite = draws[np.isfinite(draws)]
    edges = ((1 - level) / 2, (1 + level) / 2)
    low, high = np.quantile(finite, edges) if len(finite) else (float("nan"), float("nan"))
    return Interval(statistic(*samples), float(low), float(high))


def mcnemar(before: npt.ArrayLike, after: npt.ArrayLike) -> float:
    """Exact two-sided p value of McNemar's test on paired outcomes (right or wrong, the same items).

    With b items right only before and c only after: the probability under Binomial(b + c, 1/2) of a split as
    uneven.

    Raises:
        ShapeError: the outcomes differ in length.

    Example:
        >>> mcnemar([1, 1, 1, 1, 1], [0, 0, 0, 0, 0]) 0.0625
    """
    x, y = np.asarray(before, bool), np.asarray(after, bool)
    if x.shape != y.shape:
        raise ShapeError(f"mcnemar: expected outcomes of one length, found {x.shape} and {y.shape}")
    b, c = int((x & ~y).sum()), int((~x & y).sum())
    n = b + c
    if n == 0:
        return 1.0
    tail = sum(comb(n, i) for i in range(min(b, c) + 1)) / 2**n
    return float(min(1.0, 2 * tail))

"""Bootstrap intervals and McNemar's test, seeded and exact."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import comb
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import polars as pl

from microtome.errors import ShapeError

__all__ = ["Interval", "bootstrap", "jackknife", "mcnemar", "rank_correlation"]

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
        >>> bootstrap(lambda x: float(x.mean()), [np.ones(5)])
        Interval(value=1.0, low=1.0, high=1.0)
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


def jackknife(value: float, *left_out: Sequence[float]) -> Interval:
    """95 % interval of a statistic of one or more independent samples, from its values without one block each.

    SE² = Σ over samples of (B - 1)/B Σ_i (θ_(i) - mean θ_(·))², and the interval is value ± t SE with the quantile
    of Student's t of the fewest blocks less one. Unlike the bootstrap it draws no pair twice, which would make
    selected circuits noisier than the one they are about.

    Args:
        value: the statistic of everything.
        left_out: for each sample the statistic without block i, i = 1..B.

    Raises:
        ShapeError: fewer than two blocks in a sample.

    Example:
        >>> x = np.arange(10.0)
        >>> means = [float(np.delete(x, i).mean()) for i in range(10)]     # the jackknife of a mean is its s / √n
        >>> found = jackknife(float(x.mean()), means)
        >>> round(float((found.high - found.value) / (x.std(ddof=1) / 10**0.5)), 2)
        2.26
    """
    if not left_out or any(len(values) < 2 for values in left_out):
        raise ShapeError(f"jackknife: expected at least 2 blocks, found {[len(v) for v in left_out]}")
    sums = ((len(v) - 1) / len(v) * np.sum((np.asarray(v) - np.mean(v)) ** 2) for v in left_out)
    margin = _student(min(map(len, left_out)) - 1) * float(np.sqrt(sum(sums)))
    return Interval(value, value - margin, value + margin)


def _student(freedom: int) -> float:
    """97.5 % quantile of Student's t, to 0.3 % from 4 degrees of freedom on (Cornish and Fisher's expansion)."""
    known = {1: 12.706, 2: 4.303, 3: 3.182}
    z = 1.959964
    return known.get(freedom) or (
        z
        + (z**3 + z) / (4 * freedom)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * freedom**3)
    )


def mcnemar(before: npt.ArrayLike, after: npt.ArrayLike) -> float:
    """Exact two-sided p value of McNemar's test on paired outcomes (right or wrong, the same items).

    With b items right only before and c only after: the probability under Binomial(b + c, 1/2) of a split as
    uneven.

    Raises:
        ShapeError: the outcomes differ in length.

    Example:
        >>> mcnemar([1, 1, 1, 1, 1], [0, 0, 0, 0, 0])
        0.0625
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


def rank_correlation(x: npt.ArrayLike, y: npt.ArrayLike) -> float:
    """Spearman's ρ, ties at their mean rank; NaN for fewer than two values or a constant.

    Raises:
        ShapeError: the vectors differ in length.

    Example:
        >>> round(rank_correlation([1, 2, 3, 4], [1, 3, 2, 4]), 6)
        0.8
    """
    a, b = np.asarray(x, np.float64), np.asarray(y, np.float64)
    if a.shape != b.shape or a.ndim != 1:
        raise ShapeError(
            f"rank_correlation: expected two vectors of one length, found {a.shape} and {b.shape}"
        )
    ranks = [pl.Series(v).rank("average").to_numpy() for v in (a, b)]
    if len(a) < 2 or any(np.ptp(r) == 0 for r in ranks):
        return float("nan")
    return float(np.corrcoef(ranks[0], ranks[1])[0, 1])

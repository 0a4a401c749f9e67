"""Odds ratios of firing between two sets of tokens or samples, with their uncertainty."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist
from typing import Literal

import numpy as np
import numpy.typing as npt
import polars as pl

from microtome.errors import DtypeError, ShapeError
from microtome.metrics.features import FeatureStats
from microtome.metrics.samples import SampleFires

__all__ = ["OddsRatio", "odds_ratio"]

_erfc = np.frompyfunc(math.erfc, 1, 1)


@dataclass(frozen=True, eq=False)
class OddsRatio:
    """Odds ratio of every feature with normal-theory uncertainty on its logarithm; all fields (d_sae,)."""

    odds_ratio: npt.NDArray[np.float64]
    """Odds of firing in the spatial set over odds in the base set, Haldane-Anscombe corrected."""
    log_odds_ratio: npt.NDArray[np.float64]
    """Natural logarithm of the odds ratio."""
    log_standard_error: npt.NDArray[np.float64]
    """Standard error of the logarithm: root of the summed reciprocals of the four corrected cells."""
    p_value: npt.NDArray[np.float64]
    """Two-sided p-value of log odds ratio = 0 under a normal law."""

    def q_value(self) -> npt.NDArray[np.float64]:
        """False-discovery rate at which each feature is called (Benjamini and Hochberg 1995), (d_sae,)."""
        order = np.argsort(self.p_value, kind="stable")
        m = len(order)
        scaled = self.p_value[order] * m / np.arange(1, m + 1)
        q = np.empty(m)
        q[order] = np.minimum(np.minimum.accumulate(scaled[::-1])[::-1], 1.0)
        return q

    def confidence_interval(
        self, level: float = 0.95
    ) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        """Lower and upper end of the odds ratio's interval, each (d_sae,).

        Raises:
            ShapeError: ``level`` is not between 0 and 1.
        """
        if not 0 < level < 1:
            raise ShapeError(f"level: expected a number between 0 and 1, found {level}")
        reach = NormalDist().inv_cdf((1 + level) / 2) * self.log_standard_error
        return np.exp(self.log_odds_ratio - reach), np.exp(self.log_odds_ratio + reach)

    def to_polars(self) -> pl.DataFrame:
        """One row per feature; height ``d_sae``."""
        return pl.DataFrame(
            {
                "feature": np.arange(len(self.odds_ratio), dtype=np.uint32),
                "odds_ratio": self.odds_ratio,
                "log_odds_ratio": self.log_odds_ratio,
                "log_standard_error": self.log_standard_error,
                "p_value": self.p_value,
                "q_value": self.q_value(),
            }
        )


def odds_ratio(
    spatial: FeatureStats | SampleFires,
    base: FeatureStats | SampleFires,
    *,
    counts: Literal["tokens", "samples"] = "tokens",
) -> OddsRatio:
    r"""How much likelier each feature fires in one set than in another.

    :math:`OR = \frac{(a + ½)(n_b - c + ½)}{(c + ½)(n_s - a + ½)}` with a, c the firing counts among
    :math:`n_s`, :math:`n_b` units; ½ is added to all four cells of every feature (Haldane 1956, Anscombe
    1956). Standard error of its logarithm: :math:`\sqrt{\sum 1 / cell}` over the corrected cells. Tokens of
    one sample are not independent, so token counts understate it: ``counts="samples"`` counts samples.

    Args:
        spatial: counts of the set of interest.
        base: counts of the reference set.
        counts: the unit: ``"tokens"`` takes :class:`FeatureStats`, ``"samples"`` takes :class:`SampleFires`.

    Raises:
        DtypeError: statistics of another unit than ``counts`` says.
        ShapeError: the two sets differ in ``d_sae``.

    Example:
        >>> ones = np.ones(1)
        >>> s = FeatureStats(10, np.array([5], np.uint64), ones, ones, ones.astype(np.float32))
        >>> odds_ratio(s, s).odds_ratio
        array([1.])
    """
    a, n_s = _counts(spatial, counts, "spatial")  # (d_sae,)
    c, n_b = _counts(base, counts, "base")
    if len(a) != len(c):
        raise ShapeError(f"base: expected d_sae = {len(a)} as spatial, found {len(c)}")
    cells = np.stack([a, n_s - a, c, n_b - c]) + 0.5  # (4, d_sae)
    ratio = (cells[0] * cells[3]) / (cells[2] * cells[1])
    log = np.log(ratio)
    error = np.sqrt((1 / cells).sum(0))
    p = _erfc(np.abs(log) / error / math.sqrt(2)).astype(np.float64)
    return OddsRatio(ratio, log, error, p)


def _counts(stats: FeatureStats | SampleFires, unit: str, name: str) -> tuple[npt.NDArray[np.float64], int]:
    kinds = {"tokens": FeatureStats, "samples": SampleFires}
    if unit not in kinds:
        raise ShapeError(f"counts: expected 'tokens' or 'samples', found {unit!r}")
    if not isinstance(stats, kinds[unit]):
        raise DtypeError(
            f"{name}: expected {kinds[unit].__name__} for counts={unit!r}, found {type(stats).__name__}"
        )
    n = stats.n_tokens if isinstance(stats, FeatureStats) else stats.n_samples
    return stats.fires.astype(np.float64), n

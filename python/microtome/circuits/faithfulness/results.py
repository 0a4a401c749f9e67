"""What faithfulness is told as: one circuit's, and a curve over sizes. NumPy alone."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import numpy.typing as npt
import polars as pl

from microtome.circuits.statistics import Interval, bootstrap

__all__ = ["EPSILON", "Curve", "Faithfulness"]

Vector = npt.NDArray[np.float64]

EPSILON = 1e-3
"""Pairs with |LD_M - LD_∅| below this have no ratio."""


@dataclass(frozen=True, eq=False)
class Faithfulness:
    """Faithfulness of one circuit."""

    circuit: Vector = field(repr=False)
    """LD_c of every pair."""
    empty: Vector = field(repr=False)
    """LD_∅ of every pair."""
    full: Vector = field(repr=False)
    """LD_M of every pair."""
    average: Literal["ratios", "means"] = "ratios"
    ablation: str = "counterfactual"
    size: int = 0
    """Nodes of the circuit."""

    @property
    def ratios(self) -> Vector:
        """F of every pair, not clipped; NaN where |LD_M - LD_∅| < ``EPSILON``."""
        span = self.full - self.empty
        out = np.full(len(span), np.nan)
        np.divide(self.circuit - self.empty, span, out=out, where=np.abs(span) >= EPSILON)
        return out

    @property
    def n_dropped(self) -> int:
        """Pairs without a ratio."""
        return int(np.isnan(self.ratios).sum())

    @property
    def mean_of_ratios(self) -> float:
        """Mean of the pairs' ratios, the paper's formula; NaN when no pair has one."""
        ratios = self.ratios[~np.isnan(self.ratios)]
        return float(ratios.mean()) if len(ratios) else float("nan")

    @property
    def ratio_of_means(self) -> float:
        """Ratio of the mean differences, as MIB does it."""
        return _ratio_of_means(self.circuit, self.empty, self.full)

    @property
    def value(self) -> float:
        """The average that was asked for."""
        return self.mean_of_ratios if self.average == "ratios" else self.ratio_of_means

    def interval(self, n_resamples: int = 1000, seed: int = 0, level: float = 0.95) -> Interval:
        """Bootstrap interval of the value, pairs resampled."""
        if self.average == "ratios":
            return bootstrap(
                lambda r: float(np.mean(r)), [self.ratios[~np.isnan(self.ratios)]], n_resamples, seed, level
            )
        return bootstrap(_ratio_of_means, [self.circuit, self.empty, self.full], n_resamples, seed, level)

    def __float__(self) -> float:
        return self.value


def _ratio_of_means(circuit: Vector, empty: Vector, full: Vector) -> float:
    span = float(np.mean(full - empty))
    return float(np.mean(circuit - empty)) / span if abs(span) >= EPSILON else float("nan")


@dataclass(frozen=True, eq=False)
class Curve:
    """Faithfulness over circuit sizes."""

    sizes: Vector
    points: tuple[Faithfulness, ...]

    @property
    def values(self) -> Vector:
        """F at every size."""
        return np.array([point.value for point in self.points])

    def smallest(self, threshold: float = 0.8) -> float | None:
        """The first size whose faithfulness exceeds ``threshold``; None when none does."""
        above = np.flatnonzero(self.values > threshold)
        return float(self.sizes[above[0]]) if len(above) else None

    def cpr(self, log: bool = False) -> float:
        """Integrated circuit performance ratio, ∫ F dρ by trapezoids; higher is better (MIB)."""
        return _integral(self.values, self.sizes, log)

    def cmd(self, log: bool = False) -> float:
        """Integrated circuit-model distance, ∫ |1 - F| dρ; 0 is best (MIB)."""
        return _integral(np.abs(1 - self.values), self.sizes, log)

    def to_polars(self, n_resamples: int = 1000, seed: int = 0) -> pl.DataFrame:
        """One row per size: size, faithfulness, low, high, ratio_of_means, n_nodes, n_dropped."""
        intervals = [point.interval(n_resamples, seed) for point in self.points]
        return pl.DataFrame(
            {
                "size": self.sizes,
                "faithfulness": self.values,
                "low": [interval.low for interval in intervals],
                "high": [interval.high for interval in intervals],
                "ratio_of_means": [point.ratio_of_means for point in self.points],
                "n_nodes": [point.size for point in self.points],
                "n_dropped": [point.n_dropped for point in self.points],
            }
        )


def _integral(values: Vector, sizes: Vector, log: bool) -> float:
    keep = sizes > 0 if log else np.ones(len(sizes), bool)
    axis = np.log(sizes[keep]) if log else sizes[keep]
    return float(np.trapezoid(values[keep], axis))

"""The gap in firing frequency between two sets of rows, with an interval that respects samples."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import polars as pl

from microtome import _core
from microtome import progress as progress_bar
from microtome.arguments import LARGEST_SEED, MOST_RESAMPLES, flag, whole
from microtome.errors import DtypeError, ShapeError
from microtome.metrics.codes import row_pointers, runs
from microtome.metrics.features import Codes, CoreCodes, code_blocks, core_codes, feature_stats, n_rows
from microtome.metrics.rowtable import RowTable, columns
from microtome.metrics.undefined import warn_undefined

__all__ = ["FrequencyGap", "frequency_gap"]

SPAN_FIRINGS = 1 << 24
"""Firing tokens of the features of stored codes that are resampled at a time: some 400 MiB, 24 bytes each."""


@dataclass(frozen=True, eq=False)
class FrequencyGap:
    """Gap in firing frequency of every feature; arrays are (d_sae,)."""

    gap: npt.NDArray[np.float64]
    """Frequency in the spatial set minus that in the base set, over tokens."""
    standard_error: npt.NDArray[np.float64]
    """Standard deviation over bootstrap replicates; NaN where no replicate holds both sets, or a set has one cluster alone."""
    low: npt.NDArray[np.float64]
    """Lower end of the percentile interval."""
    high: npt.NDArray[np.float64]
    """Upper end."""
    level: float
    """Level of the interval."""
    n_clusters: tuple[int, int]
    """Clusters that occur in the spatial set and in the base set."""

    def excludes_zero(self) -> npt.NDArray[np.bool_]:
        """Features whose interval lies on one side of zero, (d_sae,)."""
        return (self.low > 0) | (self.high < 0)

    def to_polars(self) -> pl.DataFrame:
        """One row per feature; height ``d_sae``."""
        return pl.DataFrame(
            {
                "feature": np.arange(len(self.gap), dtype=np.uint32),
                "frequency_gap": self.gap,
                "standard_error": self.standard_error,
                "low": self.low,
                "high": self.high,
            }
        )


def frequency_gap(
    spatial: Codes,
    spatial_rows: RowTable,
    base: Codes,
    base_rows: RowTable,
    *,
    cluster: str | pl.Expr = "sample",
    shared: bool = True,
    replicates: int = 1000,
    level: float = 0.95,
    seed: int = 0,
    progress: bool = True,
) -> FrequencyGap:
    r"""Firing frequency in one set minus that in another, with a cluster bootstrap interval.

    :math:`\Delta p_f = p_f(D_{spatial}) - p_f(D_{base})` over tokens. Tokens of one sample or image are not
    independent: whole clusters are drawn with replacement and the gap taken again (Efron and Tibshirani 1993);
    the interval runs between percentiles of the replicates. The same seed gives the same bits for any number of
    threads, and for codes in memory and in a store. Stored codes are read once for their firing counts and once for
    every span of features whose firings fit into memory.

    Args:
        spatial: codes of the set of interest.
        spatial_rows: its row table, with the column of clusters.
        base: codes of the reference set, over the same dictionary.
        base_rows: its row table.
        cluster: column, or expression over columns, that names the cluster of a row, e.g. the image.
        shared: whether equal names in both sets are one cluster, as when one set lies within the other; clusters
            are then drawn for both sets at once. Otherwise each set draws its own.
        replicates: number of bootstrap replicates, 2 to a million.
        level: level of the interval.
        seed: seed of the draws.
        progress: show a bar on a terminal.

    Returns:
        Gap, standard error and interval. All but the gap are NaN, with an
        :class:`~microtome.errors.UndefinedWarning`, where a set has one cluster alone: nothing says how clusters of
        its kind differ.

    Raises:
        ShapeError: no rows, tables that do not fit, sets that differ in ``d_sae``, a level outside 0 to 1.
        NonFiniteError: an activation is NaN or infinite.
        MemoryError: replicates times clusters exceed 1 GiB of draws; of draws for either set where they are not shared.

    Example:
        >>> from microtome.metrics import SparseCodes
        >>> codes = SparseCodes(np.zeros((4, 1), np.uint32), np.ones((4, 1), np.float32), d_sae=2)
        >>> rows = {"sample": [0, 0, 1, 1]}
        >>> frequency_gap(codes, rows, codes, rows, replicates=100).gap
        array([0., 0.])
    """
    if not 0 < level < 1:
        raise ShapeError(f"level: expected a number between 0 and 1, found {level}")
    draws = whole(replicates, "replicates", 2, MOST_RESAMPLES), level, whole(seed, "seed", most=LARGEST_SEED)
    shared = flag(shared, "shared")
    if spatial.d_sae != base.d_sae:
        raise ShapeError(f"base: expected d_sae = {spatial.d_sae} as spatial, found {base.d_sae}")
    expression = pl.col(cluster) if isinstance(cluster, str) else cluster
    names = [
        columns(rows, [expression.alias("cluster")], n_rows(codes, which), f"{which}_rows").to_series()
        for codes, rows, which in ((spatial, spatial_rows, "spatial"), (base, base_rows, "base"))
    ]
    numbers = _numbered(names, shared)
    spans = []
    with progress_bar.bar("frequency gap", spatial.d_sae, progress, "features") as done:
        for first, stop in _spans(spatial, base):
            sides = [_features(codes, first, stop) for codes in (spatial, base)]
            spans.append(_core.frequency_gap(sides[0], numbers[0], sides[1], numbers[1], *draws, shared))
            done(stop)
    gap, error, low, high = (np.concatenate(column) for column in zip(*spans, strict=True))
    n_clusters = names[0].n_unique(), names[1].n_unique()
    if min(n_clusters) < 2:
        which = [name for name, n in zip(("spatial", "base"), n_clusters, strict=True) if n < 2]
        warn_undefined("the interval of frequency_gap", "expected at least 2 clusters, found 1", which)
        error = low = high = np.full_like(gap, np.nan)
    return FrequencyGap(gap, error, low, high, level, n_clusters)


def _spans(spatial: Codes, base: Codes) -> Iterator[tuple[int, int]]:
    """Spans ``first .. stop`` of features that are resampled together: one of all, unless codes are stored."""
    if not (hasattr(spatial, "blocks") or hasattr(base, "blocks")):
        yield 0, spatial.d_sae
        return
    fires = sum(feature_stats(codes, progress=False).fires for codes in (spatial, base))
    yield from runs(row_pointers(np.asarray(fires)), SPAN_FIRINGS)


def _features(codes: Codes, first: int, stop: int) -> CoreCodes:
    """The firings of the features ``first .. stop``, numbered from 0; codes in memory as they are where that is all."""
    if not hasattr(codes, "blocks") and (first, stop) == (0, codes.d_sae):
        return core_codes(codes)
    counts, indices, values = [], [], []
    for _, (shape, features, activations, _) in code_blocks(codes):
        chosen = (features >= first) & (features < stop) & (activations > 0)
        bounds = np.arange(0, len(features) + 1, shape) if isinstance(shape, int) else shape
        counts.append(np.diff(row_pointers(chosen)[bounds]))
        indices.append(features[chosen] - np.uint32(first))
        values.append(activations[chosen])
    pointers = row_pointers(np.concatenate(counts)).astype(np.uint64)
    return pointers, np.concatenate(indices), np.concatenate(values), stop - first


def _numbered(names: list[pl.Series], shared: bool) -> list[tuple[npt.NDArray[np.uint32], int]]:
    """Clusters as numbers from 0, and how many there are: over both sets where shared, else in each."""
    if pl.Object in (names[0].dtype, names[1].dtype):
        raise DtypeError("cluster: expected numbers or strings, found Object")
    if shared and names[0].dtype != names[1].dtype:
        raise ShapeError(f"base_rows: expected clusters of {names[0].dtype}, found {names[1].dtype}")
    both = pl.concat(names).rank("dense") if shared else None
    ranks = [both[: len(names[0])], both[len(names[0]) :]] if both is not None else None
    ranks = ranks or [series.rank("dense") for series in names]
    if any(series.null_count() for series in ranks):
        raise ShapeError("cluster: expected a cluster in every row, found null")
    total = [int(both.max())] * 2 if both is not None else [int(r.max()) for r in ranks]  # type: ignore[arg-type]
    return [(r.to_numpy().astype(np.uint32) - np.uint32(1), n) for r, n in zip(ranks, total, strict=True)]

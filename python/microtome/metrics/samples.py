"""Features by sample: the samples that fire a feature most, and in how many samples it fires at all."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl

from microtome import _core
from microtome import progress as progress_bar
from microtome.arguments import flag, whole
from microtome.errors import ShapeError
from microtome.metrics.codes import runs
from microtome.metrics.features import (
    Codes,
    CoreCodes,
    code_blocks,
    core_codes,
    n_rows,
    offset,
    part,
    stored_block_rows,
)
from microtome.metrics.rowtable import (
    By,
    Grouping,
    RowTable,
    columns,
    grouping,
    sample_numbers,
)

__all__ = ["SampleFires", "sample_fires", "top_samples"]


@dataclass(frozen=True, eq=False)
class SampleFires:
    """In how many samples each feature fires on at least one token."""

    n_samples: int
    """Number of samples."""
    fires: npt.NDArray[np.uint64]
    """Samples with a firing token, (d_sae,)."""

    @property
    def d_sae(self) -> int:
        """Number of features."""
        return len(self.fires)

    def firing_frequency(self) -> npt.NDArray[np.float64]:
        """Fraction of samples in which the feature fires, (d_sae,)."""
        return self.fires / self.n_samples

    def merge(self, other: SampleFires) -> SampleFires:
        """Both sets of samples together; they must have no sample in common.

        Raises:
            ShapeError: the dictionaries differ in width.
        """
        if other.d_sae != self.d_sae:
            raise ShapeError(f"other: expected d_sae = {self.d_sae}, found {other.d_sae}")
        return SampleFires(self.n_samples + other.n_samples, self.fires + other.fires)


def sample_fires(codes: Codes, rows: RowTable, *, progress: bool = True) -> SampleFires:
    """Count, for every feature, the samples of which any token fires.

    Args:
        codes: sparse codes of n rows; stored ones are read some samples at a time.
        rows: row table of n rows with a column ``sample``; the rows of a sample need not lie side by side.
        progress: show a bar on a terminal.

    Raises:
        ShapeError: no rows, another number of rows than codes, no column ``sample``.

    Example:
        >>> from microtome.metrics import SparseCodes
        >>> indices, values = np.array([[0], [0]], np.uint32), np.array([[1.0], [3.0]], np.float32)
        >>> codes = SparseCodes(indices, values, d_sae=2)
        >>> sample_fires(codes, {"sample": [7, 7]}).fires
        array([1, 0], dtype=uint64)
    """
    n = n_rows(codes)
    table = columns(rows, [pl.col("sample")], n)
    samples, _ = sample_numbers(table["sample"])
    order = np.argsort(samples, kind="stable").astype(np.uint64)
    edges = np.flatnonzero(np.diff(samples[order])) + 1
    starts = np.concatenate([[0], edges, [n]]).astype(np.uint64)
    fires = np.zeros(codes.d_sae, np.uint64)
    with progress_bar.bar("samples", n, progress) as done:
        for core, order_here, starts_here, end in _sample_blocks(codes, order, starts):
            fires += _core.sample_fires(core, order_here, starts_here)
            done(end)
    return SampleFires(len(starts) - 1, fires)


def _sample_blocks(
    codes: Codes, order: npt.NDArray[np.uint64], starts: npt.NDArray[np.uint64]
) -> Iterator[tuple[CoreCodes, npt.NDArray[np.uint64], npt.NDArray[np.uint64], int]]:
    """Whole samples at a time, as many as fill a block of rows, with their own order and bounds; memory at once."""
    if not hasattr(codes, "blocks"):
        yield core_codes(codes), order, starts, len(order)
        return
    for first, last in runs(starts, stored_block_rows(codes)):
        rows = order[starts[first] : starts[last]]  # (n_block,)
        lowest, gapless = rows.min(), int(np.ptp(rows)) + 1 == len(rows)
        block = codes[int(lowest) : int(lowest) + len(rows)] if gapless else codes[rows]
        order_here = rows - lowest if gapless else np.arange(len(rows), dtype=np.uint64)
        yield core_codes(block), order_here, starts[first : last + 1] - starts[first], int(starts[last])


def top_samples(
    codes: Codes,
    rows: RowTable,
    n: int = 20,
    *,
    features: npt.ArrayLike | None = None,
    per_sample: bool = True,
    by: By = None,
    progress: bool = True,
) -> pl.DataFrame:
    """The samples that activate each feature most, by the maximum over their tokens.

    Ties go to the smaller sample, then to the smaller position: the table is the same for any order of rows
    and any number of threads.

    Args:
        codes: sparse codes of n_rows rows.
        rows: row table with columns ``sample`` and ``position``.
        n: samples per feature.
        features: the features wanted, (m,); all where None, none where empty.
        per_sample: a sample appears once, at its strongest token; otherwise every token stands for itself.
        by: groups the rows as in :func:`feature_stats`; the table then begins with a column ``group``.
        progress: show a bar on a terminal.

    Returns:
        Columns feature, rank (from 1), sample, position, activation; features that never fire have no rows.

    Raises:
        ShapeError: no rows, a missing column, lengths that differ, ``n`` below 1, a feature beyond ``d_sae``.
        NonFiniteError: an activation is NaN or infinite.

    Example:
        >>> from microtome.metrics import SparseCodes
        >>> indices, values = np.array([[0], [0]], np.uint32), np.array([[1.0], [3.0]], np.float32)
        >>> codes = SparseCodes(indices, values, d_sae=2)
        >>> top_samples(codes, {"sample": [0, 1], "position": [4, 5]}, n=1).row(0)
        (0, 1, 1, 5, 3.0)
    """
    n, per_sample = whole(n, "n", 1), flag(per_sample, "per_sample")
    height = n_rows(codes)
    labels = row_labels(rows, height)
    groups = grouping(by, rows, height)
    wanted = None if features is None else _features(features, codes.d_sae)
    state = _core.TopState(codes.d_sae, 1 if groups is None else len(groups.keys), n, per_sample, wanted)
    with progress_bar.bar("top samples", height, progress) as done:
        for span, block in code_blocks(codes):
            samples, positions = labels.samples[span], labels.positions[span]
            state.update(block, samples, positions, part(groups, span), offset(done, span.start))
    return top_table(state, labels, groups, wanted)


@dataclass(frozen=True, eq=False)
class RowLabels:
    """Sample and position of each row, as the core takes them."""

    samples: npt.NDArray[np.uint64]
    """Number of the sample, (n,)."""
    positions: npt.NDArray[np.uint32]
    """Position of the token in its sample, (n,)."""
    ids: pl.Series | None
    """Id of each sample number; None where the numbers are the ids."""


def row_labels(rows: RowTable, n: int) -> RowLabels:
    """Columns ``sample`` and ``position`` of a row table with ``n`` rows.

    Raises:
        ShapeError: a missing column, another number of rows, a null or a negative position.
    """
    table = columns(rows, [pl.col("sample"), pl.col("position")], n)
    samples, ids = sample_numbers(table["sample"])
    return RowLabels(samples, _positions(table["position"]), ids)


def top_table(
    state: _core.TopState,
    labels: RowLabels,
    groups: Grouping | None,
    wanted: npt.NDArray[np.uint32] | None = None,
) -> pl.DataFrame:
    """What a finished state holds, as the table of :func:`top_samples`."""
    group, feature, rank, sample, position, activation = state.finish()
    frame = pl.DataFrame(
        {
            "feature": feature if wanted is None else wanted[feature],
            "rank": rank,
            "sample": sample if labels.ids is None else labels.ids.gather(sample),
            "position": position,
            "activation": activation,
        }
    )
    if groups is None:
        return frame
    return frame.select(pl.Series(groups.keys).gather(group).alias("group"), pl.all())


def _positions(positions: pl.Series) -> npt.NDArray[np.uint32]:
    if not positions.dtype.is_integer() or positions.null_count():
        raise ShapeError(f"rows: expected an integer position in every row, found {positions.dtype}")
    bounds: Any = positions.min(), positions.max()
    low, high = map(int, bounds)
    if low < 0 or high > np.iinfo(np.uint32).max:
        raise ShapeError(f"rows: expected positions from 0, found {low} to {high}")
    return np.ascontiguousarray(positions.cast(pl.UInt32).to_numpy())


def _features(features: npt.ArrayLike, d_sae: int) -> npt.NDArray[np.uint32]:
    wanted: npt.NDArray[Any] = np.asarray(features)
    if wanted.shape == (0,):
        return wanted.astype(np.uint32)
    if wanted.ndim != 1 or wanted.dtype.kind not in "iu":
        raise ShapeError(f"features: expected a list of integers, found {wanted.dtype} {wanted.shape}")
    low, high = int(wanted.min()), int(wanted.max())
    if low < 0 or high >= d_sae:
        raise ShapeError(f"features: expected 0 to {d_sae - 1}, found {low} to {high}")
    return np.ascontiguousarray(wanted, np.uint32)

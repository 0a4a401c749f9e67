"""Feature statistics: how often, how strongly and for which rows each feature of a dictionary fires."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias, overload

import numpy as np
import numpy.typing as npt
import polars as pl

from microtome import _core
from microtome import progress as progress_bar
from microtome.errors import DtypeError, NonFiniteError, ShapeError
from microtome.metrics.codes import CodesByBlock, RaggedCodes, SparseCodes, row_pointers, runs
from microtome.metrics.fields import activations, feature_numbers, row_bounds
from microtome.metrics.rowtable import By, Grouping, RowTable, grouping

__all__ = ["Codes", "FeatureStats", "feature_stats", "l0", "variance_gap"]

Codes: TypeAlias = SparseCodes | RaggedCodes | CodesByBlock
"""Sparse codes with a fixed number of slots per row, or ragged ones; their fields may be torch tensors. Or stored."""

CoreCodes: TypeAlias = tuple[
    "int | npt.NDArray[np.uint64]", npt.NDArray[np.uint32], npt.NDArray[np.float32], int
]

STORED_BLOCK_ROWS = 1 << 20
"""Rows of stored codes that are read at a time: enough for every thread to have blocks of the grid."""

STORED_BLOCK_ENTRIES = 1 << 26
"""Entries that these rows have, at most: 512 MiB of indices and values."""


@dataclass(frozen=True, eq=False)
class FeatureStats:
    """Sums over the tokens of one group of rows, one entry per feature; they merge.

    Example:
        >>> indices, values = np.array([[0], [0]], np.uint32), np.array([[1.0], [3.0]], np.float32)
        >>> feature_stats(SparseCodes(indices, values, d_sae=2)).mean_square()
        array([5., 0.])
    """

    n_tokens: int
    """Number of tokens (rows), firing or not."""
    fires: npt.NDArray[np.uint64]
    """Tokens with h > 0, (d_sae,)."""
    sum: npt.NDArray[np.float64]
    """Σ h, (d_sae,)."""
    sum_sq: npt.NDArray[np.float64]
    """Σ h², (d_sae,)."""
    max: npt.NDArray[np.float32]
    """Largest h, (d_sae,); 0 where the feature never fires."""

    @property
    def d_sae(self) -> int:
        """Number of features."""
        return len(self.fires)

    def firing_frequency(self) -> npt.NDArray[np.float64]:
        """Fraction of tokens with h > 0, (d_sae,)."""
        return self.fires / self.n_tokens

    def mean(self) -> npt.NDArray[np.float64]:
        """E[h] over all tokens, (d_sae,)."""
        return self.sum / self.n_tokens

    def mean_square(self) -> npt.NDArray[np.float64]:
        """E[h²] over all tokens, uncentred, (d_sae,)."""
        return self.sum_sq / self.n_tokens

    def dead(self) -> npt.NDArray[np.bool_]:
        """Features that fire on none of the ``n_tokens`` tokens, (d_sae,)."""
        return np.equal(self.fires, 0)

    def merge(self, other: FeatureStats) -> FeatureStats:
        """The statistics of both sets of rows together.

        Raises:
            ShapeError: the dictionaries differ in width.
        """
        if other.d_sae != self.d_sae:
            raise ShapeError(f"other: expected d_sae = {self.d_sae}, found {other.d_sae}")
        return FeatureStats(
            n_tokens=self.n_tokens + other.n_tokens,
            fires=self.fires + other.fires,
            sum=self.sum + other.sum,
            sum_sq=self.sum_sq + other.sum_sq,
            max=np.maximum(self.max, other.max),
        )

    def to_polars(self) -> pl.DataFrame:
        """One row per feature: sums and what follows from them; height ``d_sae``."""
        return pl.DataFrame(
            {
                "feature": np.arange(self.d_sae, dtype=np.uint32),
                "n_tokens": np.full(self.d_sae, self.n_tokens, np.uint64),
                "fires": self.fires,
                "firing_frequency": self.firing_frequency(),
                "mean": self.mean(),
                "mean_square": self.mean_square(),
                "max": self.max,
                "dead": self.dead(),
            }
        )


@overload
def feature_stats(
    codes: Codes, by: None = None, *, rows: RowTable = None, progress: bool = True
) -> FeatureStats: ...
@overload
def feature_stats(
    codes: Codes, by: pl.Expr | pl.Series | npt.ArrayLike, *, rows: RowTable = None, progress: bool = True
) -> dict[Any, FeatureStats]: ...
def feature_stats(
    codes: Codes, by: By = None, *, rows: RowTable = None, progress: bool = True
) -> FeatureStats | dict[Any, FeatureStats]:
    """Firing counts, sums, sums of squares and maxima of every feature, in one pass over the codes.

    A feature fires on a token where h > 0. Sums are taken in float64; they are the same bit for bit for any
    number of threads.

    Args:
        codes: sparse codes of n rows, in memory or in a store.
        by: groups the rows: n labels (integers, strings or booleans), or a polars expression or column name
            over ``rows``.
        rows: row table of n rows (polars frame, mapping of columns, or activations of a store).
        progress: show a bar on a terminal.

    Returns:
        :class:`FeatureStats` of all rows, or one per group by its label.

    Raises:
        ShapeError: no rows, another number of labels than rows, a feature index beyond ``d_sae``.
        NonFiniteError: an activation is NaN or infinite.

    Example:
        >>> indices, values = np.array([[0], [1]], np.uint32), np.array([[1.0], [3.0]], np.float32)
        >>> groups = feature_stats(SparseCodes(indices, values, d_sae=2), by=["image", "text"])
        >>> groups["text"].fires
        array([0, 1], dtype=uint64)
    """
    n = n_rows(codes)
    groups = grouping(by, rows, n)
    state = _core.FiringState(codes.d_sae, 1 if groups is None else len(groups.keys), n)
    with progress_bar.bar("feature statistics", n, progress) as done:
        for span, block in code_blocks(codes):
            state.update(block, part(groups, span), offset(done, span.start))
    return firing_stats(state, groups, n)


def variance_gap(vision: FeatureStats | Codes, text: FeatureStats | Codes) -> npt.NDArray[np.float64]:
    r"""Uncentred second moment on vision tokens minus that on text tokens, (d_sae,).

    :math:`\Delta_f = E_{vision}[h_f^2] - E_{text}[h_f^2]`, each mean over all tokens of its side.

    Args:
        vision: statistics, or codes, of the vision-language side.
        text: the same of the text side, over the same dictionary width.

    Raises:
        ShapeError: the two sides differ in ``d_sae``.

    Example:
        >>> codes = SparseCodes(np.array([[0]], np.uint32), np.array([[2.0]], np.float32), d_sae=2)
        >>> variance_gap(codes, codes[:1])
        array([0., 0.])
    """
    sides = [side if isinstance(side, FeatureStats) else feature_stats(side) for side in (vision, text)]
    if sides[0].d_sae != sides[1].d_sae:
        raise ShapeError(f"text: expected d_sae = {sides[0].d_sae} as vision, found {sides[1].d_sae}")
    return sides[0].mean_square() - sides[1].mean_square()


def l0(codes: FeatureStats | Codes) -> float:
    """Mean number of features that fire on a token.

    Example:
        >>> l0(SparseCodes(np.array([[0, 1]], np.uint32), np.array([[2.0, 0.0]], np.float32), d_sae=2))
        1.0
    """
    stats = codes if isinstance(codes, FeatureStats) else feature_stats(codes)
    return float(stats.fires.sum() / stats.n_tokens)


def core_codes(codes: Any, name: str = "codes") -> CoreCodes:
    """Codes in memory as the core takes them: row pointers or slots per row, indices, values, width.

    Raises:
        DtypeError: indices that are not integers, or activations that are not floating point.
        ShapeError: no slots, or shapes that differ.
    """
    indices = feature_numbers(codes.indices, codes.d_sae, f"{name}.indices")
    values = activations(codes.values, f"{name}.values")
    indptr = getattr(codes, "indptr", None)
    if indptr is None and (indices.ndim != 2 or indices.shape != values.shape):
        raise ShapeError(
            f"{name}: expected indices and values (n, k), found {indices.shape} and {values.shape}"
        )
    if indptr is None and indices.shape[1] == 0:
        raise ShapeError(f"{name}: expected at least one slot per row, found shape {indices.shape}")
    pointers = indices.shape[1] if indptr is None else _pointers(indptr, f"{name}.indptr")
    return pointers, _flat(indices), _flat(values), codes.d_sae


def n_rows(codes: Codes | Any, name: str = "codes") -> int:
    """Number of rows of codes.

    Raises:
        DtypeError: not sparse codes.
        ShapeError: no rows.
    """
    if not all(hasattr(codes, field) for field in ("indices", "values", "d_sae")):
        raise DtypeError(f"{name}: expected SparseCodes or RaggedCodes, found {type(codes).__name__}")
    if len(codes) == 0:
        raise ShapeError(f"{name}: expected at least one row, found no rows selected")
    return len(codes)


def code_blocks(codes: Codes | Any) -> Iterator[tuple[slice, CoreCodes]]:
    """Codes as the core takes them, and the rows they cover: memory at once, a store block by block."""
    if not hasattr(codes, "blocks"):
        yield slice(0, len(codes)), core_codes(codes)
        return
    for span in _stored_spans(codes):
        yield span, core_codes(codes[span])


def _stored_spans(codes: Any) -> Iterator[slice]:
    """Rows of stored codes to read at a time, whole blocks of the FVU's grid: ragged ones as their entries allow."""
    grid, ragged = _core.FVU_BLOCK_ROWS, hasattr(codes, "fires")
    height = _on_grid(STORED_BLOCK_ROWS) if ragged else stored_block_rows(codes)
    for start in range(0, len(codes), height):
        stop = min(start + height, len(codes))
        if not ragged:
            yield slice(start, stop)
            continue
        blocks = np.add.reduceat(codes.fires[start:stop], np.arange(0, stop - start, grid), dtype=np.int64)
        for first, end in runs(row_pointers(blocks), STORED_BLOCK_ENTRIES):
            yield slice(start + first * grid, min(start + end * grid, stop))


def stored_block_rows(codes: Any) -> int:
    """Rows of stored codes to read at a time, by their mean number of entries; whole blocks of the FVU's grid."""
    per_row = math.prod(codes.indices.shape) / len(codes)
    return _on_grid(min(STORED_BLOCK_ROWS, int(STORED_BLOCK_ENTRIES / max(per_row, 1))))


def _on_grid(rows: int) -> int:
    """Whole blocks of the FVU's grid, at least one."""
    return max(rows // _core.FVU_BLOCK_ROWS, 1) * _core.FVU_BLOCK_ROWS


def offset(done: Callable[[int], None], first: int) -> Callable[[int], None]:
    """Reports progress within a block that begins at row ``first``."""
    return lambda rows: done(first + rows)


@contextmanager
def counted_from(first: int) -> Iterator[None]:
    """Says of what is refused within a block that its rows are counted from row ``first``, where the block begins."""
    try:
        yield
    except NonFiniteError as error:
        if first == 0:
            raise
        raise NonFiniteError(f"{error}, counted from row {first}") from None


def part(groups: Grouping | None, span: slice) -> npt.NDArray[np.uint32] | None:
    """The groups of the rows of ``span``."""
    return None if groups is None else groups.of_rows[span]


def firing_stats(
    state: _core.FiringState, groups: Grouping | None, n: int
) -> FeatureStats | dict[Any, FeatureStats]:
    """What a finished state holds: one :class:`FeatureStats`, or one for each group."""
    columns = state.finish()
    if groups is None:
        return FeatureStats(n, *columns)
    fires, total, total_sq, largest = (column.reshape(len(groups.keys), -1) for column in columns)
    return {
        key: FeatureStats(int(size), fires[g], total[g], total_sq[g], largest[g])
        for g, (key, size) in enumerate(zip(groups.keys, groups.sizes(), strict=True))
    }


def _flat(field: npt.NDArray[Any]) -> npt.NDArray[Any]:
    return np.ascontiguousarray(field).reshape(-1)


def _pointers(indptr: Any, name: str) -> npt.NDArray[np.uint64]:
    return np.ascontiguousarray(row_bounds(indptr, name), np.uint64)

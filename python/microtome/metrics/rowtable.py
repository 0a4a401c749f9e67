"""Row tables beside codes: which sample, position and group each row belongs to."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import polars as pl

from microtome.errors import DtypeError, Error, ShapeError

__all__ = [
    "By",
    "Grouping",
    "RowTable",
    "column",
    "columns",
    "grouping",
    "label_groups",
    "sample_numbers",
]

RowTable: TypeAlias = pl.LazyFrame | pl.DataFrame | Mapping[str, Any] | Any
"""A polars frame, a mapping of columns, or what has such a table as ``.rows``: activations of a store."""

By: TypeAlias = pl.Expr | pl.Series | npt.ArrayLike | None
"""What groups rows: one label per row, or a polars expression (or column name) over the row table."""


@dataclass(frozen=True, eq=False)
class Grouping:
    """Rows by group, the groups in rising order of their keys."""

    keys: list[Any]
    """Label of each group."""
    of_rows: npt.NDArray[np.uint32]
    """Number of the group of each row, (n,)."""

    def sizes(self) -> npt.NDArray[np.int64]:
        """Rows per group, (n_groups,)."""
        return np.bincount(self.of_rows, minlength=len(self.keys))


def columns(rows: RowTable, wanted: list[pl.Expr], n: int, name: str = "rows") -> pl.DataFrame:
    """The ``wanted`` columns of a row table with ``n`` rows.

    Raises:
        ShapeError: a column is missing, or the table has another number of rows.
        DtypeError: what polars cannot compute.
    """
    if not isinstance(rows, pl.LazyFrame | pl.DataFrame | Mapping):
        rows = getattr(rows, "rows", None)
    if isinstance(rows, Mapping):
        with _refusals(name):
            rows = pl.DataFrame({key: column(key, values) for key, values in rows.items()})
    if not isinstance(rows, pl.LazyFrame | pl.DataFrame):
        raise DtypeError(
            f"{name}: expected a polars frame or a mapping of columns, found {type(rows).__name__}"
        )
    with _refusals(name):
        table = _roots(rows.lazy(), wanted).collect().select(wanted)
    if table.height != n:
        raise ShapeError(f"{name}: expected {n} rows, one for each row of the codes, found {table.height}")
    return table


def _roots(rows: pl.LazyFrame, wanted: list[pl.Expr]) -> pl.LazyFrame:
    """The columns that ``wanted`` is computed from.

    They are collected before anything is computed: polars 2.1 forgets the order of a lazy join when a ``when`` is
    selected from it.
    """
    roots = {name for expression in wanted for name in expression.meta.root_names()}
    if not roots or any(expression.meta.has_multiple_outputs() for expression in wanted):
        return rows
    return rows.select(sorted(roots))


def grouping(by: By, rows: RowTable, n: int) -> Grouping | None:
    """The group of each of ``n`` rows; None where ``by`` is None.

    Raises:
        ShapeError: another number of labels than rows, or an expression without a row table.
    """
    if by is None:
        return None
    if isinstance(by, str):
        by = pl.col(by)
    if isinstance(by, pl.Expr):
        if rows is None:
            raise ShapeError(f"rows: expected a row table for the expression {by}, found None. Pass rows=")
        labels = columns(rows, [by.alias("group")], n).to_series()
    else:
        labels = column("by", by)
    if len(labels) != n:
        raise ShapeError(f"by: expected {n} labels, one for each row of the codes, found {len(labels)}")
    return label_groups(labels, "by")


def label_groups(labels: pl.Series, name: str) -> Grouping:
    """Rows by their labels.

    Raises:
        DtypeError: labels that do not stand for groups.
    """
    if labels.dtype.is_float() or labels.dtype.is_nested() or labels.dtype == pl.Object:
        raise DtypeError(f"{name}: expected integer, string or boolean labels, found {labels.dtype}")
    keys, numbers = _dense(labels)
    return Grouping(keys.to_list(), numbers.astype(np.uint32))


def sample_numbers(samples: pl.Series) -> tuple[npt.NDArray[np.uint64], pl.Series | None]:
    """Sample ids as unsigned numbers in the order of the ids; and the ids, unless they are such numbers.

    Raises:
        ShapeError: a row has no sample.
    """
    if samples.null_count():
        raise ShapeError(f"rows: expected a sample in every row, found {samples.null_count()} null")
    if samples.dtype.is_integer() and _within(samples, np.uint64):
        return np.ascontiguousarray(samples.cast(pl.UInt64).to_numpy()), None
    keys, numbers = _dense(samples)
    return numbers.astype(np.uint64), keys


def _within(numbers: pl.Series, dtype: type[np.unsignedinteger[Any]]) -> bool:
    """Whether all of them fit into ``dtype``."""
    bounds: Any = numbers.min(), numbers.max()
    return not len(numbers) or (int(bounds[0]) >= 0 and int(bounds[1]) <= np.iinfo(dtype).max)


def _dense(labels: pl.Series) -> tuple[pl.Series, npt.NDArray[np.int64]]:
    """Distinct labels in rising order (null first), and the place of each label among them."""
    with _refusals(labels.name):
        keys = labels.unique().sort()
    places = pl.DataFrame({"key": keys, "place": pl.Series(range(len(keys)), dtype=pl.Int64)})
    found = pl.DataFrame({"key": labels}).join(
        places, on="key", how="left", nulls_equal=True, maintain_order="left"
    )
    return keys, found["place"].to_numpy()


def column(name: str, values: Any) -> pl.Series:
    """One entry per row, as a polars series.

    Raises:
        ShapeError: not one-dimensional.
        DtypeError: entries of several types.
    """
    if isinstance(values, pl.Series):
        return values
    array = np.asarray(values)
    if array.ndim != 1:
        raise ShapeError(f"{name}: expected one entry per row, found shape {array.shape}")
    with _refusals(name):
        return pl.Series(name, array.tolist() if array.dtype.kind in "OU" else array)


@contextmanager
def _refusals(name: str) -> Iterator[None]:
    """What polars refuses, in one line that names the argument."""
    try:
        yield
    except Error:
        raise
    except pl.exceptions.DuplicateError as error:
        raise ShapeError(f"{name}: expected expressions of one column each, found several columns") from error
    except pl.exceptions.ColumnNotFoundError as error:
        raise ShapeError(f"{name}: expected a column of the table, found {_first_line(error)}") from error
    except pl.exceptions.ShapeError as error:
        raise ShapeError(f"{name}: expected columns of one length, found {_first_line(error)}") from error
    except (pl.exceptions.PolarsError, TypeError) as error:
        raise DtypeError(f"{name}: expected values that polars takes, found {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]

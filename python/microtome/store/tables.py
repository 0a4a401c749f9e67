"""Row and sample tables of a store as polars LazyFrames: columns are read when a query asks for them."""

from __future__ import annotations

import io
from collections.abc import Iterator

import numpy as np
import polars as pl
from polars.io.plugins import register_io_source

from microtome import _core
from microtome.errors import StoreError

__all__ = ["KINDS", "PLACE", "ROW", "row_frame", "row_schema", "sample_frame", "selected"]

KINDS = ["text", "image", "video"]
"""Token kinds, in the order of their codes on disk."""

ROW = "row"
"""Number of a row in its row space; the column by which selections are made."""

PLACE = "__place"
"""Where a row stands in the selection that is filtered; never shown."""

_CHUNK = 1 << 20
_TYPES: dict[str, pl.DataType] = {"uint8": pl.UInt8(), "uint32": pl.UInt32(), "uint64": pl.UInt64()}


def row_schema(reader: _core.StoreReader, space: str) -> dict[str, pl.DataType]:
    """Columns of the row table of ``space``, the row number first."""
    columns = next((columns for name, _, columns in reader.spaces if name == space), None)
    if columns is None:
        known = ", ".join(name for name, _, _ in reader.spaces)
        raise StoreError(f"no row space {space!r}: {reader.path}: expected one of {known}")
    schema: dict[str, pl.DataType] = {ROW: pl.UInt64()}
    for name, dtype, _ in columns:
        schema[name] = _TYPES[dtype]
    if "kind" in schema:
        schema["kind"] = pl.Enum(KINDS)
    if "special" in schema:
        schema["special"] = pl.Boolean()
    return schema


def row_frame(reader: _core.StoreReader, space: str) -> pl.LazyFrame:
    """The row table of ``space`` with row numbers; a query reads what it names, a million rows at a time."""
    schema = row_schema(reader, space)
    n = sum(step[space] for step in reader.steps)

    def read(
        with_columns: list[str] | None, predicate: pl.Expr | None, n_rows: int | None, batch_size: int | None
    ) -> Iterator[pl.DataFrame]:
        names = list(schema) if with_columns is None else with_columns
        end, chunk = n if n_rows is None else min(n, n_rows), batch_size or _CHUNK
        for start in range(0, max(end, 1), chunk):
            stop = min(start + chunk, end)
            frame = pl.DataFrame([_series(reader, space, name, schema[name], start, stop) for name in names])
            yield frame if predicate is None else frame.filter(predicate)

    return register_io_source(read, schema=schema)


def _series(
    reader: _core.StoreReader, space: str, name: str, dtype: pl.DataType, start: int, stop: int
) -> pl.Series:
    if name == ROW:
        return pl.Series(name, np.arange(start, stop, dtype=np.uint64))
    values = np.asarray(reader.row_column(space, name).read(start, stop))
    if name != "kind":
        return pl.Series(name, values).cast(dtype)
    if values.size and values.max() >= len(KINDS):
        raise StoreError(f"unknown token kind: {reader.path}: expected 0, 1 or 2, found {values.max()}")
    return pl.Series(name, KINDS, dtype=dtype).gather(values)


def sample_frame(reader: _core.StoreReader) -> pl.LazyFrame:
    """One row per sample: ``sample``, ``id`` and the user's columns, null where a step lacks one."""
    frames = [pl.scan_parquet(io.BytesIO(reader.samples(step))) for step in range(len(reader.steps))]
    if not frames:
        return pl.LazyFrame(schema={"sample": pl.UInt64(), "id": pl.String()})
    return pl.concat(frames, how="diagonal_relaxed")


def ordered_join(rows: pl.LazyFrame, others: pl.LazyFrame, on: str, suffix: str = "_right") -> pl.LazyFrame:
    """``rows`` with the columns of ``others``, in the order of ``rows`` whatever is selected from it later.

    polars 2.1 forgets the order of a lazy join as soon as a ``when`` is selected from it (its optimisation
    ``check_order_observe``); an opaque step after the join keeps it.
    """
    joined = rows.join(others, on=on, how="left", maintain_order="left", suffix=suffix)
    return joined.map_batches(_as_it_is, predicate_pushdown=False, slice_pushdown=False)


def _as_it_is(frame: pl.DataFrame) -> pl.DataFrame:
    return frame


def selected(
    rows: pl.LazyFrame, samples: pl.LazyFrame, predicates: tuple[pl.Expr, ...], row_columns: set[str]
) -> pl.LazyFrame:
    """The rows that meet all predicates, one after the other; samples are joined where one needs them."""
    named = {name for predicate in predicates for name in predicate.meta.root_names()}
    if not named <= row_columns or any(p.meta.has_multiple_outputs() for p in predicates):
        rows = ordered_join(rows, samples, "sample", "_sample")
        missing = named - set(rows.collect_schema().names())
        if missing:
            known = ", ".join(name for name in rows.collect_schema().names() if name != PLACE)
            raise StoreError(f"no column {sorted(missing)[0]!r} in rows or samples: expected one of {known}")
    for predicate in predicates:
        rows = rows.filter(predicate)
    return rows

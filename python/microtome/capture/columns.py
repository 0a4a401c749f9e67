"""Columns of the sample table: each keeps the type of its first step, and every value that it was given."""

from __future__ import annotations

import datetime
import enum
import io
from collections.abc import Iterable, Mapping
from numbers import Number
from typing import Any

import polars as pl

from microtome.errors import DtypeError, first_line

__all__ = ["ColumnTypes", "parquet"]


class ColumnTypes:
    """The type that each column has so far."""

    def __init__(self) -> None:
        self._types: dict[str, pl.DataType] = {}

    def learn(self, frame: pl.DataFrame) -> None:
        """Take in the types of a step, where those before it left them open."""
        for name, dtype in frame.schema.items():
            self._types[name] = _settled(self._types.get(name, pl.Null()), dtype)

    def series(self, name: str, values: list[Any]) -> pl.Series:
        """The values as a column.

        Raises:
            DtypeError: they do not fit the column's type, or would come back as other values.
        """
        known = self._types.get(name, pl.Null())
        try:
            series = pl.Series(name, values, strict=True)
            numbers = series.dtype.is_numeric() and known.is_numeric()
            dtype = series.dtype if numbers else _settled(known, series.dtype)
            if series.dtype != dtype:
                series = pl.Series(name, values, dtype=dtype, strict=True)
            pairs = zip(values, series.to_list(), strict=True)
            lost = [value for value, kept in pairs if not _same(value, kept)]
        except (TypeError, ValueError, OverflowError, pl.exceptions.PolarsError) as error:
            raise DtypeError(_unfit(name, known, first_line(error))) from error
        if lost or series.dtype != dtype:  # polars leaves arrays of another length as they are
            raise DtypeError(_unfit(name, known, f"{(lost or values)[0]!r:.80}"))
        return series


def parquet(frame: pl.DataFrame) -> bytes:
    """The table as parquet.

    Raises:
        DtypeError: a column of values that parquet has no type for.
    """
    buffer = io.BytesIO()
    try:
        frame.write_parquet(buffer, compression="zstd")
    except pl.exceptions.PolarsError as error:
        if frame.width > 1:
            for name in frame.columns:
                parquet(frame.select(name))
        found = type(next(iter(frame.to_series().drop_nulls().to_list()), None)).__name__
        raise DtypeError(
            f"samples: {frame.columns[0]}: expected numbers, text, dates or lists and mappings of them, found {found}"
        ) from error
    return buffer.getvalue()


def _unfit(name: str, known: pl.DataType, found: str) -> str:
    expected = "values of one type" if known == pl.Null else known
    return f"samples: {name}: expected {expected}, found others ({found}). A column keeps the type of its first step"


def _settled(first: Any, found: Any) -> Any:
    """The first type; the parts of it that had no value yet are as they are found."""
    if first == pl.Null:
        return found
    if isinstance(first, pl.List) and isinstance(found, pl.List):
        return pl.List(_settled(first.inner, found.inner))
    if isinstance(first, pl.Struct) and isinstance(found, pl.Struct):
        others = found.to_schema()
        return pl.Struct({k: _settled(v, others.get(k, v)) for k, v in first.to_schema().items()})
    return first


def _same(given: Any, kept: Any) -> bool:
    """Whether a value came back from its column; None may stand where a mapping lacks a key.

    Only numbers, text and what is missing are compared: dates and the like come back in polars' own resolution.
    """
    given = given.value if isinstance(given, enum.Enum) else given
    given = given.tolist() if hasattr(given, "tolist") else given
    if isinstance(given, Mapping) and isinstance(kept, Mapping):
        return all(_same(given.get(key), kept.get(key)) for key in given.keys() | kept.keys())
    if isinstance(kept, list):
        many = isinstance(given, Iterable) and not isinstance(given, str | bytes | Mapping)
        return many and len(kept) == len(list(given)) and all(map(_same, given, kept))
    if kept is None:
        return given is None or bool(given != given)
    if isinstance(given, datetime.datetime):
        return isinstance(kept, datetime.datetime)
    if isinstance(kept, Number | str | bytes):
        return bool(given == kept or (given != given and kept != kept))
    return True

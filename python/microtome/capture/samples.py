"""The sample table of a capture: who was captured, in what order, with the user's columns."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from pathlib import Path
from typing import Any

import polars as pl

from microtome.errors import DtypeError, ShapeError

__all__ = ["CommittedIds", "SampleTable"]

RESERVED = ("sample", "id")


class CommittedIds(Set[Any]):
    """The ids whose step is committed; grows while the writer commits, and may be read meanwhile."""

    def __init__(self, ids: Iterable[Any] = ()) -> None:
        self._ids = dict.fromkeys(ids)

    def __contains__(self, id_: object) -> bool:
        return id_ in self._ids

    def __iter__(self) -> Iterator[Any]:
        return iter(list(self._ids))

    def __len__(self) -> int:
        return len(self._ids)

    def __repr__(self) -> str:
        return f"CommittedIds({len(self)} ids)"

    def add(self, ids: Iterable[Any]) -> None:
        """Take in the ids of a committed step."""
        self._ids.update(dict.fromkeys(ids))


class SampleTable:
    """Samples of a store by ordinal; the open step's rows until they are committed."""

    def __init__(self, path: Path, steps: int) -> None:
        """Read back what ``steps`` committed steps hold."""
        files = [path / f"{step:06d}" / "samples.parquet" for step in range(steps)]
        frames = [pl.read_parquet(file, glob=False) for file in files]
        self.resumed = {id_ for frame in frames for id_ in frame["id"].to_list()}
        """Ids committed before this run: their samples are not captured again."""
        self.done = CommittedIds(self.resumed)
        self._schema = dict(frames[0].schema) if frames else None
        self._next = sum(frame.height for frame in frames)
        self._taken: set[Any] = set()
        self._open: list[dict[str, Any]] = []
        self.open_tokens = self.open_rows = 0

    def reserve(self, ids: Sequence[Any], columns: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
        """Check the names of a forward's samples and give one record each, without an ordinal.

        Raises:
            ShapeError: a duplicate id, a column of another length, other columns than before.
        """
        ids = list(ids)
        if not ids:
            raise ShapeError("samples: ids: expected one id per sample of the next forward, found none")
        for name, values in columns.items():
            if name in RESERVED:
                raise ShapeError(f"samples: {name}: this column is the table's own. Choose another name")
            if isinstance(values, (str, bytes)) or len(values) != len(ids):
                found = "one string" if isinstance(values, (str, bytes)) else len(values)
                raise ShapeError(f"samples: {name}: expected {len(ids)} values, one per id, found {found}")
        self._check_columns(columns)
        seen = set(self._taken)
        for id_ in ids:
            if not isinstance(id_, (str, int)) or isinstance(id_, bool):
                raise DtypeError(f"samples: ids: expected strings or integers, found {type(id_).__name__}")
            if id_ in seen:
                raise ShapeError(f"samples: ids: expected every id once, found {id_!r} again")
            seen.add(id_)
        self._taken = seen
        return [{"id": id_, **{name: columns[name][i] for name in columns}} for i, id_ in enumerate(ids)]

    def release(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Forget samples whose forward failed; their ids may come again."""
        self._taken.difference_update(record["id"] for record in records)

    def add(self, record: Mapping[str, Any], tokens: int, rows: int) -> int:
        """Append a sample with so many tokens and stored rows to the open step, and give its ordinal."""
        ordinal = self._next
        self._next += 1
        self._open.append({"sample": ordinal, **record})
        self.open_tokens += tokens
        self.open_rows += rows
        return ordinal

    def close_step(self) -> tuple[bytes, list[Any]]:
        """The open step's samples as parquet, and their ids; the next sample opens a new step.

        Raises:
            DtypeError: a column whose values do not fit the type that the first step gave it.
        """
        columns = {name: [record[name] for record in self._open] for name in self._open[0]}
        ids = columns["id"]
        self._open = []
        self.open_tokens = self.open_rows = 0
        frame = pl.DataFrame([self._series(name, values) for name, values in columns.items()])
        self._schema = dict(frame.schema)
        buffer = io.BytesIO()
        frame.write_parquet(buffer, compression="zstd")
        return buffer.getvalue(), ids

    def _series(self, name: str, values: list[Any]) -> pl.Series:
        dtype = pl.UInt64() if name == "sample" else (self._schema or {}).get(name)
        try:
            series = pl.Series(name, values, dtype=dtype, strict=True)
        except (TypeError, ValueError, OverflowError, pl.exceptions.PolarsError) as error:
            expected = dtype or "values of one type"
            raise DtypeError(
                f"samples: {name}: expected {expected}, found other values ({str(error).splitlines()[0]}). "
                f"A column keeps the type of its first step"
            ) from error
        return series.cast(pl.String) if series.dtype == pl.Null else series

    def _check_columns(self, columns: Mapping[str, Sequence[Any]]) -> None:
        known = [
            name for name in (self._schema or (self._open[0] if self._open else {})) if name not in RESERVED
        ]
        if (self._schema or self._open) and sorted(known) != sorted(columns):
            raise ShapeError(
                f"samples: expected the columns {sorted(known)} of this store, found {sorted(columns)}"
            )

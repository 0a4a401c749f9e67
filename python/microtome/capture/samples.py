"""The sample table of a capture: who was captured, in what order, with the user's columns."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from microtome.capture.columns import ColumnTypes, parquet
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
        """Read back what ``steps`` committed steps hold.

        Raises:
            CorruptShardError: a table whose bytes are not those that were committed.
        """
        frames = _committed(path, steps)
        self.resumed = {id_ for frame in frames for id_ in frame["id"].to_list()}
        """Ids committed before this run: their samples are not captured again."""
        self.done = CommittedIds(self.resumed)
        self._columns = sorted(set(frames[0].columns) - set(RESERVED)) if frames else None
        self._types = ColumnTypes()
        for frame in frames:
            self._types.learn(frame)
        self._next = sum(frame.height for frame in frames)
        self._taken: set[Any] = set()
        self._open: list[dict[str, Any]] = []
        self.open_tokens = self.open_rows = 0

    def reserve(self, ids: Sequence[Any], columns: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
        """Check the names of a forward's samples and give one record each, without an ordinal.

        Raises:
            ShapeError: a duplicate id, a column of another length, other columns than before.
        """
        ids = [_plain(id_) for id_ in ids]
        if not ids:
            raise ShapeError("samples: ids: expected one id per sample of the next forward, found none")
        for name, values in columns.items():
            if name in RESERVED:
                raise ShapeError(f"samples: {name}: this column is the table's own. Choose another name")
            if isinstance(values, (str, bytes)) or len(values) != len(ids):
                found = "one string" if isinstance(values, (str, bytes)) else len(values)
                raise ShapeError(f"samples: {name}: expected {len(ids)} values, one per id, found {found}")
        if self._columns not in (None, sorted(columns)):
            raise ShapeError(
                f"samples: expected the columns {self._columns} of this store, found {sorted(columns)}"
            )
        self._check_ids(ids)
        records = [{"id": id_, **{name: columns[name][i] for name in columns}} for i, id_ in enumerate(ids)]
        self._columns = sorted(columns)
        self._taken.update(ids)
        return records

    def _check_ids(self, ids: Sequence[Any]) -> None:
        for id_ in ids:
            if type(id_) not in (str, int):
                raise DtypeError(f"samples: ids: expected strings or integers, found {type(id_).__name__}")
        known = type(next(iter(self._taken or self.resumed), ids[0]))
        again = [id_ for id_ in ids if id_ in self._taken] or [
            id_ for id_, n in Counter(ids).items() if n > 1
        ]
        if again:
            raise ShapeError(f"samples: ids: expected every id once, found {again[0]!r} again")
        if any(type(id_) is not known for id_ in ids):
            raise DtypeError(
                f"samples: ids: expected {known.__name__} throughout, found {type(ids[-1]).__name__}"
            )

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
            DtypeError: a column whose values do not fit the type that the first step gave it, or no type at all.
        """
        records, self._open = self._open, []
        self.open_tokens = self.open_rows = 0
        columns = {name: [record[name] for record in records] for name in records[0]}
        ordinals = pl.Series("sample", columns.pop("sample"), dtype=pl.UInt64)
        named = [self._types.series(name, values) for name, values in columns.items()]
        self._types.learn(pl.DataFrame(named))
        return parquet(pl.DataFrame([ordinals, *named])), columns["id"]


def _plain(id_: Any) -> Any:
    """An id as the stored table gives it back: NumPy's strings and integers, and other subclasses, as Python's own."""
    if isinstance(id_, str):
        return str.__str__(id_)
    return int(id_) if isinstance(id_, int | np.integer) and not isinstance(id_, bool) else id_


def _committed(path: Path, steps: int) -> list[pl.DataFrame]:
    """The sample table of each committed step; its checksum is compared before anything parses it."""
    if not steps:
        return []
    from microtome._core import StoreReader

    reader = StoreReader(str(path))
    return [pl.read_parquet(io.BytesIO(reader.samples(step))) for step in range(steps)]

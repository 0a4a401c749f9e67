"""What made a table: kept in the table's own metadata, so that no number is separated from where it came from.

>>> import polars as pl
>>> made = Record("cka", {"runs/llava": "2f6b01c4"}, {"debiased": True}, rows=4096)
>>> path = write_table(pl.DataFrame({"cka": [0.98]}), "/tmp/cka.parquet", made)
>>> read_record(path) == made
True
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import polars as pl

from microtome._core import __version__, num_threads
from microtome.errors import StoreError

__all__ = ["Record", "read_record", "require_same_inputs", "write_table"]

_KEY = "microtome.record"


@dataclass(frozen=True)
class Record:
    """The inputs, parameters and versions behind a table.

    Two runs of one method on the same inputs give equal records: the number of threads is noted and not compared, since
    no result depends on it.
    """

    method: str
    """The verb or the function."""
    inputs: Mapping[str, str]
    """Fingerprint of everything that was read (stores, codes, dictionaries, models), by name."""
    parameters: Mapping[str, Any] = field(default_factory=dict)
    """Arguments as they were resolved; plain JSON values."""
    rows: int | None = None
    """Rows that entered, where the method reads rows."""
    version: str = __version__
    """Version of microtome."""
    threads: int = field(default_factory=num_threads, compare=False)
    """Threads that computed it."""


def write_table(table: pl.DataFrame, path: str | Path, record: Record) -> Path:
    """Write ``table`` as parquet with ``record`` in its metadata; any parquet reader opens it."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    table.write_parquet(target, metadata={_KEY: json.dumps(asdict(record), default=str)})
    return target


def read_record(path: str | Path) -> Record | None:
    """The record of a table; None where the file has none."""
    text = pl.read_parquet_metadata(Path(path)).get(_KEY)
    return None if text is None else Record(**json.loads(text))


def require_same_inputs(tables: Sequence[str | Path]) -> None:
    """Refuse tables that were made from different inputs.

    An input counts as different when it bears one name and two fingerprints: a store that has grown, say, between two
    tables of one report.

    Raises:
        StoreError: names the input, and the two tables that saw it differently.
    """
    seen: dict[str, tuple[str, str | Path]] = {}
    for path in tables:
        record = read_record(path)
        for name, fingerprint in {} if record is None else record.inputs.items():
            known, first = seen.setdefault(name, (fingerprint, path))
            if known != fingerprint:
                raise StoreError(
                    f"tables: expected one state of {name}, found {known} in {first} and {fingerprint} in {path}. "
                    "Make both from the same data"
                )

"""Sparse codes on disk, read: a store of their own below the activations they came from, with the same promises."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from microtome import _core
from microtome.errors import StoreError
from microtome.metrics.codes import RaggedCodes, SparseCodes, row_entries, row_pointers
from microtome.store.places import block_starts, places, run_of

__all__ = ["CODES", "StoredCodes", "StoredRaggedCodes", "codes_folder", "open_codes"]

CODES = "codes"
"""Folder of codes in a store of activations."""


def codes_folder(store: Path, name: str) -> Path:
    """Where codes called ``name`` lie.

    Raises:
        StoreError: a name that is not one folder.
    """
    if not re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,199}", name):
        raise StoreError(f"name: expected letters, digits and ._-, found {name!r}")
    return store / CODES / name


def open_codes(path: Path, verify: str = "first", backend: str = "mmap") -> StoredCodes | StoredRaggedCodes:
    """The codes in the folder ``path``, fixed-k or ragged as they were written.

    Raises:
        StoreError: no store there, or one that holds something else.
    """
    reader = _core.StoreReader(str(path), verify, backend)
    (_, space, columns), *others = reader.hooks
    names = [name for name, _, _ in columns]
    if not others and (space, names) == ("tokens", ["indices", "values"]):
        return StoredCodes(reader)
    if not others and (space, names) == ("entries", ["values"]):
        return StoredRaggedCodes(reader)
    raise StoreError(f"not sparse codes: {path}: expected indices and values, found {', '.join(names)}")


class StoredColumn:
    """One tensor of stored codes: reads as NumPy, without a copy where rows lie side by side."""

    def __init__(self, selection: _core.Selection) -> None:
        self._rows = selection
        self.shape: tuple[int, ...] = (len(selection),)
        """Rows and slots, (n, k); or entries, (n_entries,)."""
        if selection.width is not None:
            self.shape += (selection.width,)
        self.dtype = np.dtype(selection.dtype)
        """Element type."""

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, rows: Any) -> npt.NDArray[Any]:
        if run := run_of(rows, len(self)):
            return np.asarray(self._rows.read(*run))
        chosen = self._rows.take(places(rows, len(self)))
        return np.asarray(chosen.read(0, len(chosen)))


class _Stored:
    """What fixed-k and ragged codes have in common."""

    def __init__(self, reader: _core.StoreReader) -> None:
        self._reader = reader
        (self.hook, _, _), *_ = reader.hooks
        self.facts: dict[str, Any] = json.loads(reader.facts)
        """Hook, width and fingerprint of the dictionary, fingerprint of the store of activations."""

    @property
    def d_sae(self) -> int:
        """Width of the dictionary."""
        return int(self.facts["d_sae"])

    @property
    def fingerprint(self) -> str:
        """Checksum over all files of the codes."""
        return self._reader.fingerprint

    @property
    def row_numbers(self) -> npt.NDArray[np.uint64]:
        """Number of each row in the store of activations, (n,)."""
        rows = self._reader.row_column("tokens", "row")
        return np.asarray(rows.read(0, len(rows)))

    def verify(self) -> list[str]:
        """Check every byte: one line per problem, empty when sound."""
        return self._reader.verify()


class StoredCodes(_Stored):
    """Sparse codes of a selection of a store. Slices are :class:`~microtome.metrics.SparseCodes`.

    Example:
        >>> codes = store.codes("topk")                                  # doctest: +SKIP
        >>> codes[:100].to_dense().shape                                 # doctest: +SKIP
        (100, 16384)
    """

    def __init__(self, reader: _core.StoreReader) -> None:
        super().__init__(reader)
        self.indices = StoredColumn(reader.hook(self.hook, "indices"))
        """Feature of each slot, uint32 (n, k)."""
        self.values = StoredColumn(reader.hook(self.hook, "values"))
        """Activation of each slot, float32 (n, k); 0 where nothing fired."""

    @property
    def k(self) -> int:
        """Slots per row."""
        return self.indices.shape[1]

    def __len__(self) -> int:
        return len(self.indices)

    def __repr__(self) -> str:
        return f"StoredCodes({self.hook!r}, n={len(self)}, k={self.k}, d_sae={self.d_sae})"

    def __getitem__(self, rows: Any) -> SparseCodes:
        return SparseCodes(self.indices[rows], self.values[rows], self.d_sae)

    def blocks(self, n: int = 65_536) -> Iterator[SparseCodes]:
        """Codes of at most ``n`` rows, from the first row to the last."""
        for start in block_starts(len(self), n):
            yield self[start : start + n]


class StoredRaggedCodes(_Stored):
    """Ragged codes of a selection of a store. Slices are :class:`~microtome.metrics.RaggedCodes`.

    Where a row's entries begin is the sum of :attr:`fires` in front of it. The manifest has that sum for every step,
    so a slice reads the counts of its own step and rows alone, and nothing is held per row of the store.

    Example:
        >>> codes = store.codes("jumprelu")                              # doctest: +SKIP
        >>> codes[:100].to_dense().shape                                 # doctest: +SKIP
        (100, 16384)
    """

    def __init__(self, reader: _core.StoreReader) -> None:
        super().__init__(reader)
        self.fires = StoredColumn(reader.row_column("tokens", "fires"))
        """Number of entries of each row, uint32 (n,)."""
        self.indices = StoredColumn(reader.row_column("entries", "indices"))
        """Feature of each entry, row after row, uint32 (n_entries,)."""
        self.values = StoredColumn(reader.hook(self.hook, "values"))
        """Activation of each entry, float32 (n_entries,)."""
        steps = reader.steps
        self._rows, self._entries = (
            row_pointers(np.array([step[space] for step in steps], np.int64))
            for space in ("tokens", "entries")
        )

    @property
    def indptr(self) -> npt.NDArray[np.int64]:
        """Where each row begins and ends, (n + 1,): 8 bytes a row, which slices and blocks do without."""
        return row_pointers(self.fires[:])

    def __len__(self) -> int:
        return len(self.fires)

    def __repr__(self) -> str:
        entries = len(self.indices)
        return f"StoredRaggedCodes({self.hook!r}, n={len(self)}, entries={entries}, d_sae={self.d_sae})"

    def __getitem__(self, rows: Any) -> RaggedCodes:
        if run := run_of(rows, len(self)):
            return self._side_by_side(*run, self._first_entry(run[0]))
        chosen = places(rows, len(self)).astype(np.int64)  # (m,)
        indptr, entries = row_entries(self._first_entries(chosen), self.fires[chosen])
        return RaggedCodes(indptr, self.indices[entries], self.values[entries], self.d_sae)

    def blocks(self, n: int = 65_536) -> Iterator[RaggedCodes]:
        """Codes of at most ``n`` rows, from the first row to the last; a block is all that is held."""
        first = 0
        for start in block_starts(len(self), n):
            block = self._side_by_side(start, min(start + n, len(self)), first)
            first += len(block.indices)
            yield block

    def verify(self) -> list[str]:
        """Check every byte, and that rows and entries are in step: one line per problem, empty when sound."""
        return super().verify() or [
            f"step {step:06}: expected {end - first} entries, found rows with {fires}"
            for step, (first, end) in enumerate(zip(self._entries, self._entries[1:], strict=False))
            if (fires := int(self._fires_of(step).sum())) != end - first
        ]

    def _side_by_side(self, start: int, stop: int, first: int) -> RaggedCodes:
        """The rows ``start..stop``, whose entries begin at ``first``."""
        indptr = row_pointers(self.fires[start:stop])
        end = first + int(indptr[-1])
        if end > len(self.indices):
            raise StoreError(
                f"rows and entries out of step: {self._reader.path}: expected {end} entries at row {stop}, "
                f"found {len(self.indices)}"
            )
        return RaggedCodes(indptr, self.indices[first:end], self.values[first:end], self.d_sae)

    def _fires_of(self, step: int) -> npt.NDArray[np.uint32]:
        return self.fires[self._rows[step] : self._rows[step + 1]]

    def _first_entry(self, row: int) -> int:
        step = int(np.searchsorted(self._rows, row, "right")) - 1
        return int(self._entries[step]) + int(self.fires[self._rows[step] : row].sum())

    def _first_entries(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Where the entries of each of ``rows`` begin, (m,); the counts of one step in memory at a time."""
        first = np.empty(len(rows), np.int64)
        step = np.searchsorted(self._rows, rows, "right") - 1
        order = np.argsort(step, kind="stable")
        edges = np.flatnonzero(np.diff(step[order])) + 1
        for here in np.split(order, edges) if len(rows) else ():
            s = int(step[here[0]])
            first[here] = self._entries[s] + row_pointers(self._fires_of(s))[rows[here] - self._rows[s]]
        return first

"""Sparse codes on disk: a store of their own below the activations they came from, with the same promises."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from microtome import _core
from microtome.errors import ShapeError, StoreError
from microtome.store.activations import places

if TYPE_CHECKING:
    from microtome.metrics import SparseCodes
    from microtome.store.activations import Activations
    from microtome.store.reading import ActivationStore

__all__ = ["CODES", "CodesWriter", "StoredCodes", "codes_folder"]

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


class StoredColumn:
    """One tensor of stored codes, (n, k): reads as NumPy, without a copy where rows lie side by side."""

    def __init__(self, selection: _core.Selection) -> None:
        self._rows = selection
        self.shape = (len(selection), selection.width or 1)
        """Rows and slots, (n, k)."""
        self.dtype = np.dtype(selection.dtype)
        """Element type."""

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, rows: Any) -> npt.NDArray[Any]:
        if isinstance(rows, slice) and rows.step in (None, 1):
            start, stop, _ = rows.indices(len(self))
            return np.asarray(self._rows.read(start, max(start, stop)))
        chosen = self._rows.take(places(rows, len(self)))
        return np.asarray(chosen.read(0, len(chosen)))


class StoredCodes:
    """Sparse codes of a selection of a store. Slices are :class:`~microtome.metrics.SparseCodes`.

    Example:
        >>> codes = store.codes("topk")                                  # doctest: +SKIP
        >>> codes[:100].to_dense().shape                                 # doctest: +SKIP
        (100, 16384)
    """

    def __init__(self, path: Path, verify: str = "first", backend: str = "mmap") -> None:
        self._reader = _core.StoreReader(str(path), verify, backend)
        (self.hook, _, _), *_ = self._reader.hooks
        self.facts: dict[str, Any] = json.loads(self._reader.facts)
        """Hook, width and fingerprint of the dictionary, fingerprint of the store of activations."""
        self.indices = StoredColumn(self._reader.hook(self.hook, "indices"))
        """Feature of each slot, uint32 (n, k)."""
        self.values = StoredColumn(self._reader.hook(self.hook, "values"))
        """Activation of each slot, float32 (n, k); 0 where nothing fired."""

    @property
    def d_sae(self) -> int:
        """Width of the dictionary."""
        return int(self.facts["d_sae"])

    @property
    def k(self) -> int:
        """Slots per row."""
        return self.indices.shape[1]

    @property
    def fingerprint(self) -> str:
        """Checksum over all files of the codes."""
        return self._reader.fingerprint

    @property
    def row_numbers(self) -> npt.NDArray[np.uint64]:
        """Number of each row in the store of activations, (n,)."""
        rows = self._reader.row_column("tokens", "row")
        return np.asarray(rows.read(0, len(rows)))

    def __len__(self) -> int:
        return len(self.indices)

    def __repr__(self) -> str:
        return f"StoredCodes({self.hook!r}, n={len(self)}, k={self.k}, d_sae={self.d_sae})"

    def __getitem__(self, rows: Any) -> SparseCodes:
        from microtome.metrics import SparseCodes

        return SparseCodes(self.indices[rows], self.values[rows], self.d_sae)

    def blocks(self, n: int = 65_536) -> Iterator[SparseCodes]:
        """Codes of at most ``n`` rows, from the first row to the last."""
        if n < 1:
            raise ShapeError(f"n: expected at least 1 row per block, found {n}")
        for start in range(0, len(self), n):
            yield self[start : start + n]

    def verify(self) -> list[str]:
        """Check every byte: one line per problem, empty when sound."""
        return self._reader.verify()


class CodesWriter:
    """Writes codes block by block, resuming an earlier writer; see :meth:`ActivationStore.write_codes`.

    Leaving the ``with`` block commits what was appended; an exception drops what is not committed.
    """

    def __init__(
        self,
        store: ActivationStore,
        name: str,
        acts: Activations,
        *,
        k: int,
        d_sae: int,
        dictionary: str,
        step_rows: int,
    ) -> None:
        facts = {
            "kind": "sparse codes",
            "hook": acts.hook,
            "space": acts.space,
            "d_sae": d_sae,
            "dictionary": dictionary,
            "store": store.fingerprint,
        }
        self._rows = acts.row_numbers
        self._d_sae = d_sae
        self._step_rows = step_rows
        folder = str(codes_folder(store.path, name))
        self._writer = _core.CodesWriter(folder, hook=acts.hook, k=k, facts=json.dumps(facts))
        self._committed = self._written = self._writer.n_rows

    @property
    def n_rows(self) -> int:
        """Rows written so far, those of an earlier run included: encode from this one on."""
        return self._written

    def append(self, codes: SparseCodes) -> None:
        """Append the codes of the next rows.

        Raises:
            ShapeError: more rows than the selection has, another ``k`` or another ``d_sae``.
        """
        if codes.d_sae != self._d_sae:
            raise ShapeError(f"codes: expected d_sae {self._d_sae}, found {codes.d_sae}")
        end = self._written + len(codes.indices)
        if end > len(self._rows):
            raise ShapeError(f"codes: expected {len(self._rows)} rows in all, found {end}")
        rows = self._rows[self._written : end]
        self._writer.append(rows, np.ascontiguousarray(codes.indices), np.ascontiguousarray(codes.values))
        self._written = end
        if self._written - self._committed >= self._step_rows:
            self.commit()

    def commit(self) -> None:
        """Commit what has been appended."""
        self._writer.commit()
        self._committed = self._written

    def close(self) -> None:
        """Drop what is not committed and release the codes."""
        self._writer.close()

    def __enter__(self) -> CodesWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self.commit()
        finally:
            self.close()

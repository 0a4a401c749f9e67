"""Sparse codes on disk, written: block by block, resumed after any end."""

from __future__ import annotations

import json
from pathlib import Path
from types import TracebackType

import numpy as np

from microtome import _core
from microtome.errors import ShapeError, StoreError
from microtome.metrics.codes import RaggedCodes, SparseCodes
from microtome.store.activations import Activations

__all__ = ["CodesWriter"]


class CodesWriter:
    """Writes codes block by block, resuming an earlier writer; see :meth:`ActivationStore.write_codes`.

    Leaving the ``with`` block commits what was appended; an exception drops what is not committed.
    """

    def __init__(
        self, folder: Path, acts: Activations, *, k: int | None, d_sae: int, dictionary: str, step_rows: int
    ) -> None:
        facts = {
            "kind": "ragged sparse codes" if k is None else "sparse codes",
            "hook": acts.hook,
            "space": acts.space,
            "d_sae": d_sae,
            "dictionary": dictionary,
            "store": acts.store.fingerprint,
        }
        self._rows = acts.row_numbers
        self._k, self._d_sae = k, d_sae
        self._step_rows = step_rows
        self._writer = _core.CodesWriter(str(folder), hook=acts.hook, k=k, facts=json.dumps(facts))
        self._committed = self._written = self._writer.n_rows
        try:
            self._refuse_other_rows(folder, acts.store.backend)
        except BaseException:
            self._writer.close()
            raise

    def _refuse_other_rows(self, folder: Path, backend: str) -> None:
        """Refuse to go on where the committed codes are not those of the first rows of this selection."""
        n = self._written
        if n == 0:
            return
        column = _core.StoreReader(str(folder), "first", backend).row_column("tokens", "row")
        committed = np.asarray(column.read(0, n))
        if n > len(self._rows):
            found = f"a selection of {len(self._rows)}"
        elif (others := np.flatnonzero(committed != self._rows[:n])).size:
            first = others[0]
            found = f"row {self._rows[first]} in place of row {committed[first]}"
        else:
            return
        raise StoreError(
            f"cannot resume: {folder}: expected a selection that begins with the {n} rows encoded there, "
            f"found {found}. Give the selection of the first run, or another name"
        )

    @property
    def n_rows(self) -> int:
        """Rows written so far, those of an earlier run included: encode from this one on."""
        return self._written

    def append(self, codes: SparseCodes | RaggedCodes) -> None:
        """Append the codes of the next rows.

        Raises:
            ShapeError: more rows than the selection has, another ``k`` or another ``d_sae``; ragged codes where
                ``k`` is given, or slots where it is not.
            NonFiniteError: NaN or infinity among the activations.
        """
        if codes.d_sae != self._d_sae:
            raise ShapeError(f"codes: expected d_sae {self._d_sae}, found {codes.d_sae}")
        end = self._written + len(codes)
        if end > len(self._rows):
            raise ShapeError(f"codes: expected {len(self._rows)} rows in all, found {end}")
        rows = self._rows[self._written : end]
        indices, values = np.ascontiguousarray(codes.indices), np.ascontiguousarray(codes.values)
        if isinstance(codes, RaggedCodes):
            if self._k is not None:
                raise ShapeError(
                    f"codes: expected SparseCodes with k={self._k}, found {codes!r}. Pass k=None"
                )
            fires = np.diff(codes.indptr).astype(np.uint32)
            self._writer.append_ragged(rows, fires, indices, values)
        else:
            if self._k is None:
                raise ShapeError(
                    f"codes: expected RaggedCodes, as k=None says, found {codes!r}. Pass k={codes.k}"
                )
            self._writer.append(rows, indices, values)
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

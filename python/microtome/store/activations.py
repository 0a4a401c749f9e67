"""Activations of one hook: a lazy selection of rows, read as tensors, in blocks, or straight by the core."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import polars as pl

from microtome import _core, tensors
from microtome.errors import DtypeError
from microtome.store.places import block_starts, places, run_of
from microtome.store.tables import PLACE, ROW, ordered_join, row_schema, selected

if TYPE_CHECKING:
    from microtome.store.reading import ActivationStore

__all__ = ["Activations", "without_damage"]


class Activations:
    """Rows of one hook, shape (n, d). Every metric takes it where it takes a matrix, and streams it.

    Tensors it gives are private: where rows lie side by side they are copy-on-write views of the file, not
    copied until somebody writes, and writing changes neither the store nor another tensor.

    Example:
        >>> acts = store["blocks.1.hook_resid_post"]                     # doctest: +SKIP
        >>> image = acts.where(pl.col("kind") == "image")                # doctest: +SKIP
        >>> mean = sum(block.sum(0) for block in image.blocks(65_536)) / len(image)  # doctest: +SKIP
    """

    def __init__(
        self,
        store: ActivationStore,
        hook: str,
        space: str,
        selection: _core.Selection,
        predicates: tuple[pl.Expr, ...] = (),
        skipped: npt.NDArray[np.uint64] | None = None,
    ) -> None:
        self.store = store
        """Store that holds the rows."""
        self.hook = hook
        """Hook name."""
        self.space = space
        """Row space of the hook: ``"tokens"`` for the decoder."""
        self.skipped = np.empty(0, np.uint64) if skipped is None else skipped
        """Numbers of the rows of the hook that lie under damage and are left out, ascending."""
        self._base = selection
        self._predicates = predicates

    @cached_property
    def _selection(self) -> _core.Selection:
        """The rows as the core reads them; predicates are evaluated here, at the first use."""
        if not self._predicates:
            return self._base
        chosen = self._filtered().select(PLACE).collect().get_column(PLACE)
        return self._base.take(chosen.to_numpy())

    def _base_rows(self) -> pl.LazyFrame:
        """The row table of the base, with :data:`PLACE`: where each row stands in the base."""
        rows = self.store._row_frame(self.space)
        if self._base.is_all:
            return rows.with_columns(pl.col(ROW).alias(PLACE))
        chosen = pl.LazyFrame({ROW: self._base.indices()}).with_columns(
            pl.int_range(pl.len(), dtype=pl.UInt64).alias(PLACE)
        )
        return ordered_join(chosen, rows, ROW)

    def _filtered(self) -> pl.LazyFrame:
        columns = set(row_schema(self.store._reader, self.space))
        return selected(self._base_rows(), self.store.samples, self._predicates, columns)

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and width, (n, d)."""
        return len(self._selection), self.width

    @property
    def width(self) -> int:
        """Elements per row, ``d``; known without evaluating a selection."""
        return self._base.width or 1

    @property
    def dtype(self) -> Any:
        """Element type: a torch dtype, or its name when torch is missing."""
        try:
            import torch
        except ImportError:
            return self._base.dtype
        return getattr(torch, self._base.dtype)

    def __len__(self) -> int:
        return len(self._selection)

    def __repr__(self) -> str:
        n = (
            "rows not evaluated"
            if self._predicates and "_selection" not in self.__dict__
            else f"{len(self)} rows"
        )
        return f"Activations({self.hook!r}, {n}, d={self.width}, {self._base.dtype})"

    def __getitem__(self, rows: Any) -> Any:
        """Rows as a tensor (NumPy without torch): a number, a slice, row numbers or a mask."""
        if isinstance(rows, int | np.integer):
            return self[places(rows, len(self))][0]
        if run := run_of(rows, len(self)):
            return self._read(self._selection, *run)
        chosen = self._selection.take(places(rows, len(self)))
        return self._read(chosen, 0, len(chosen))

    def _read(self, selection: _core.Selection, start: int, stop: int) -> Any:
        return tensors.to_tensor(np.asarray(selection.read(start, stop)), selection.dtype)

    def where(self, *predicates: pl.Expr) -> Activations:
        """The rows that meet polars expressions over rows and samples. Nothing is read before it is needed.

        Args:
            predicates: Boolean expressions, applied one after the other, over the columns of rows (``row``,
                ``sample``, ``position``, ``token_id``, ``kind``, ``special``) and samples (``id``, others).

        Example:
            >>> acts.where(pl.col("kind") == "image", pl.col("domain") == "vqa")    # doctest: +SKIP
        """
        for predicate in predicates:
            if not isinstance(predicate, pl.Expr):
                raise DtypeError(f"predicates: expected polars expressions, found {type(predicate).__name__}")
        predicates = (*self._predicates, *predicates)
        return Activations(self.store, self.hook, self.space, self._base, predicates, self.skipped)

    def take(self, rows: Any) -> Activations:
        """The rows given (a slice, numbers or a mask), in their order; reads no activations."""
        if run := run_of(rows, len(self)):
            chosen = self._selection.slice(*run)
        else:
            chosen = self._selection.take(places(rows, len(self)))
        return Activations(self.store, self.hook, self.space, chosen, skipped=self.skipped)

    def blocks(self, n: int = 65_536) -> Iterator[Any]:
        """Tensors of at most ``n`` rows, (n, d), from the first row to the last."""
        for start in block_starts(len(self), n):
            yield self[start : start + n]

    @property
    def row_numbers(self) -> npt.NDArray[np.uint64]:
        """Number of each row in its row space, (n,)."""
        return self._selection.indices()

    @property
    def rows(self) -> pl.LazyFrame:
        """The row table of this selection: one row per activation, in their order."""
        rows = self._filtered() if self._predicates else self._base_rows()
        columns = [name for name in row_schema(self.store._reader, self.space) if name != ROW]
        return rows.select(columns)

    @property
    def sample_ids(self) -> pl.LazyFrame:
        """``sample`` and ``id`` of each row, in their order."""
        ids = self.store.samples.select("sample", "id")
        return ordered_join(self.rows.select("sample"), ids, "sample")

    def numpy(self) -> npt.NDArray[Any]:
        """All rows as one array, (n, d); bf16 is widened to float32."""
        values: npt.NDArray[Any] = np.asarray(self._selection.read(0, len(self)))
        if self._base.dtype == "bfloat16":
            return (values.astype(np.uint32) << 16).view(np.float32)
        return values

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> npt.NDArray[Any]:
        values = self.numpy()
        return values if dtype is None else values.astype(dtype)


def without_damage(selection: _core.Selection) -> tuple[_core.Selection, npt.NDArray[np.uint64]]:
    """All rows of a column but those under damage, and the numbers of these."""
    damaged = selection.damaged_rows()
    if not damaged:
        return selection, np.empty(0, np.uint64)
    skipped = np.unique(np.concatenate([np.arange(start, stop, dtype=np.uint64) for start, stop in damaged]))
    sound = np.setdiff1d(np.arange(len(selection), dtype=np.uint64), skipped, assume_unique=True)
    return selection.take(sound), skipped

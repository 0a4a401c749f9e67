"""Sparse codes: the few features of each row that fire, and how strongly.

Two shapes of one thing. :class:`SparseCodes` has ``k`` slots per row, as a Top-K encoder gives them.
:class:`RaggedCodes` has as many entries per row as fired, as JumpReLU, ReLU and BatchTopK give them.
Both are immutable, slice by row, and convert to dense, CSR and torch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from microtome import _core, tensors
from microtome.errors import ShapeError
from microtome.metrics.fields import activations, feature_numbers, row_bounds

__all__ = [
    "CSR",
    "CodesByBlock",
    "RaggedCodes",
    "RowIndex",
    "SparseCodes",
    "row_entries",
    "row_pointers",
    "runs",
]

CSR: TypeAlias = tuple[npt.NDArray[np.int64], npt.NDArray[np.uint32], npt.NDArray[np.float32]]
"""``(indptr, indices, values)``: the entries of row ``i`` are those at ``indptr[i]:indptr[i + 1]``."""

RowIndex: TypeAlias = slice | npt.NDArray[np.integer[Any]] | npt.NDArray[np.bool_]
"""What selects rows: a slice, row numbers, or a mask."""


@dataclass(frozen=True, eq=False, repr=False)
class SparseCodes:
    """Top-K codes: ``k`` slots per row, largest value first, equal values by lower feature index.

    A slot that no positive pre-activation fills holds value 0 (and index 0). The features of a row's filled slots are
    distinct: which of two values would count is not defined.

    Example:
        >>> codes = SparseCodes(np.array([[3, 1]], np.uint32), np.array([[2.0, 0.5]], np.float32), d_sae=4)
        >>> codes.to_dense()
        array([[0. , 0.5, 0. , 2. ]], dtype=float32)
    """

    indices: npt.NDArray[np.uint32]
    """Feature of each slot, (n, k)."""
    values: npt.NDArray[np.float32]
    """Activation of each slot, (n, k), descending; 0 where nothing fired."""
    d_sae: int
    """Width of the dictionary."""

    def __post_init__(self) -> None:
        if self.indices.ndim != 2 or self.indices.shape != self.values.shape:
            raise ShapeError(
                f"indices: expected (n, k) as values {self.values.shape}, found shape {self.indices.shape}"
            )
        _check_width(self.indices, self.d_sae)

    @property
    def k(self) -> int:
        """Slots per row."""
        return int(self.indices.shape[1])

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, rows: RowIndex) -> SparseCodes:
        return SparseCodes(self.indices[_row_index(rows)], self.values[_row_index(rows)], self.d_sae)

    def __repr__(self) -> str:
        return f"SparseCodes(n={len(self)}, k={self.k}, d_sae={self.d_sae})"

    def to_torch(self) -> tuple[Any, Any]:
        """Tensors ``(indices int64 (n, k), values float32 (n, k))``."""
        return _to_torch(feature_numbers(self.indices, self.d_sae), activations(self.values))

    def to_csr(self) -> CSR:
        """``(indptr, indices, values)`` without the empty slots."""
        indices, values = feature_numbers(self.indices, self.d_sae), activations(self.values)
        filled = values != 0  # (n, k)
        return row_pointers(filled.sum(1)), indices[filled], values[filled]

    def to_ragged(self) -> RaggedCodes:
        """The same codes without the empty slots."""
        return RaggedCodes(*self.to_csr(), d_sae=self.d_sae)

    def to_dense(self) -> npt.NDArray[np.float32]:
        """Activations of all features, (n, d_sae), float32. Needs ``4 * n * d_sae`` bytes."""
        return _dense(*self.to_csr(), self.d_sae)

    def decode(self, W_dec: Any, b_dec: Any = None) -> Any:
        r"""Reconstruct the inputs: :math:`\hat x = \sum_j z_j W_{dec,j} + b_{dec}`, over the entries alone.

        Args:
            W_dec: decoder (d_sae, d_in), tensor or array of float32, float16 or bfloat16.
            b_dec: bias (d_in,), or None for zero.

        Returns:
            float32 (n, d_in): a tensor when ``W_dec`` is one, else an array.

        Raises:
            ShapeError: ``W_dec`` has another number of features than the codes.
        """
        return _decode(self.to_csr(), self.d_sae, W_dec, b_dec)


@dataclass(frozen=True, eq=False, repr=False)
class RaggedCodes:
    """Codes with as many entries per row as fired, largest value first, equal values by lower feature index.

    The features of a row are distinct, as in :class:`SparseCodes`.

    Example:
        >>> indices, values = np.array([3, 1], np.uint32), np.array([2.0, 0.5], np.float32)
        >>> codes = RaggedCodes(np.array([0, 2, 2]), indices, values, d_sae=4)
        >>> len(codes), codes.to_dense()[0]
        (2, array([0. , 0.5, 0. , 2. ], dtype=float32))
    """

    indptr: npt.NDArray[np.int64]
    """Where each row begins and ends, (n + 1,)."""
    indices: npt.NDArray[np.uint32]
    """Feature of each entry, (n_entries,)."""
    values: npt.NDArray[np.float32]
    """Activation of each entry, (n_entries,), positive."""
    d_sae: int
    """Width of the dictionary."""

    def __post_init__(self) -> None:
        if self.indices.ndim != 1 or self.indices.shape != self.values.shape:
            raise ShapeError(
                f"indices: expected one per value {self.values.shape}, found shape {self.indices.shape}"
            )
        _check_bounds(row_bounds(self.indptr), len(self.indices))
        _check_width(self.indices, self.d_sae)

    def __len__(self) -> int:
        return len(self.indptr) - 1

    def __getitem__(self, rows: RowIndex) -> RaggedCodes:
        chosen = np.arange(len(self))[_row_index(rows)]  # (m,)
        bounds = row_bounds(self.indptr)
        indptr, entries = row_entries(bounds[chosen], np.diff(bounds)[chosen])
        return RaggedCodes(indptr, self.indices[entries], self.values[entries], self.d_sae)

    def __repr__(self) -> str:
        return f"RaggedCodes(n={len(self)}, entries={len(self.indices)}, d_sae={self.d_sae})"

    def to_torch(self) -> tuple[Any, Any, Any]:
        """Tensors ``(indptr int64, indices int64, values float32)``, for ``torch.sparse_csr_tensor``."""
        import torch

        return torch.from_numpy(np.array(row_bounds(self.indptr))), *_to_torch(
            feature_numbers(self.indices, self.d_sae), activations(self.values)
        )

    def to_csr(self) -> CSR:
        """``(indptr, indices, values)``."""
        indices, values = feature_numbers(self.indices, self.d_sae), activations(self.values)
        return row_bounds(self.indptr), indices, values

    def to_dense(self) -> npt.NDArray[np.float32]:
        """Activations of all features, (n, d_sae), float32. Needs ``4 * n * d_sae`` bytes."""
        return _dense(*self.to_csr(), self.d_sae)

    def decode(self, W_dec: Any, b_dec: Any = None) -> Any:
        """Reconstruct the inputs, as :meth:`SparseCodes.decode`."""
        return _decode(self.to_csr(), self.d_sae, W_dec, b_dec)


class CodesByBlock(Protocol):
    """Codes that are read block by block: those of a store."""

    @property
    def d_sae(self) -> int:
        """Width of the dictionary."""

    def __len__(self) -> int: ...

    def __getitem__(self, rows: Any, /) -> SparseCodes | RaggedCodes: ...

    def blocks(self, n: int = ...) -> Iterator[SparseCodes] | Iterator[RaggedCodes]:
        """Codes of at most ``n`` rows, from the first row to the last."""


def row_pointers(counts: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
    """Where rows of so many entries begin and end, (n + 1,)."""
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(counts, dtype=np.int64)])


def runs(pointers: npt.NDArray[Any], most: int) -> Iterator[tuple[int, int]]:
    """Runs ``first .. stop`` of neighbouring rows, each with as many rows as have at most ``most`` entries; at least one.

    Example:
        >>> list(runs(row_pointers(np.array([3, 1, 9, 2])), most=5))
        [(0, 2), (2, 3), (3, 4)]
    """
    ends, first = pointers.astype(np.int64), 0
    while first < len(ends) - 1:
        stop = max(first + 1, int(np.searchsorted(ends, ends[first] + most, "right")) - 1)
        yield first, stop
        first = stop


def row_entries(
    starts: npt.NDArray[np.int64], counts: npt.NDArray[Any]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Rows of ``counts`` (m,) entries that begin at ``starts`` (m,), put side by side.

    Returns:
        Where each row begins and ends there, (m + 1,), and the number of every entry of theirs.
    """
    indptr = row_pointers(counts)
    return indptr, np.arange(indptr[-1]) + np.repeat(starts - indptr[:-1], counts)


def _row_index(rows: RowIndex) -> RowIndex:
    if isinstance(rows, slice):
        return rows
    index: npt.NDArray[Any] = np.asarray(rows)
    if index.ndim != 1 or index.dtype.kind not in "iub":
        raise ShapeError(f"rows: expected a slice, row numbers or a mask, found {index.dtype} {index.shape}")
    return index


def _check_bounds(indptr: npt.NDArray[np.int64], n_entries: int) -> None:
    if indptr.ndim != 1 or not len(indptr):
        raise ShapeError(f"indptr: expected (n + 1,) numbers, found shape {indptr.shape}")
    expected = f"indptr: expected to rise from 0 to {n_entries}"
    if indptr[0] != 0 or indptr[-1] != n_entries:
        raise ShapeError(f"{expected}, found {indptr[0]} to {indptr[-1]}")
    falls = np.flatnonzero(indptr[1:] < indptr[:-1])
    if len(falls):
        row = int(falls[0])
        raise ShapeError(f"{expected}, found {indptr[row]} and then {indptr[row + 1]} at row {row}")


def _check_width(indices: Any, d_sae: int) -> None:
    """Features of an array or a tensor, which stays on its device, are below ``d_sae``."""
    if math.prod(indices.shape) and int(indices.max()) >= d_sae:
        raise ShapeError(f"indices: expected below d_sae = {d_sae}, found {int(indices.max())}")


def _to_torch(indices: npt.NDArray[np.uint32], values: npt.NDArray[np.float32]) -> tuple[Any, Any]:
    import torch

    return torch.from_numpy(indices.astype(np.int64)), torch.from_numpy(np.array(values))


def _dense(
    indptr: npt.NDArray[np.int64],
    indices: npt.NDArray[np.uint32],
    values: npt.NDArray[np.float32],
    d_sae: int,
) -> npt.NDArray[np.float32]:
    n = len(indptr) - 1
    dense = np.zeros((n, d_sae), np.float32)
    dense[np.repeat(np.arange(n), np.diff(indptr)), indices] = values
    return dense


def _decode(codes: CSR, d_sae: int, W_dec: Any, b_dec: Any) -> Any:
    decoder = tensors.core_matrix(W_dec, "W_dec")
    height, d_in = tensors.memory(decoder).shape
    if height != d_sae:
        raise ShapeError(f"W_dec: expected ({d_sae}, d_in) as the codes, found {height} rows")
    bias = None if b_dec is None else tensors.core_vector(b_dec, "b_dec", d_in)
    indptr, indices, values = codes
    rows = np.ascontiguousarray(indptr), np.ascontiguousarray(indices), np.ascontiguousarray(values)
    x_hat = _core.decode(*rows, decoder, bias)  # (n, d_in)
    return tensors.to_tensor(x_hat, "float32") if tensors.is_tensor(W_dec) else x_hat

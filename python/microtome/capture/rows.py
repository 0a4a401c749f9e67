"""Which tokens of a forward become rows, and what each stands for.

Token rows are the unpadded tokens of each sample in order; positions count from the sample's first token,
wherever the padding is.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from microtome.errors import ShapeError

__all__ = ["Flags", "Ints", "TokenRows", "row_arrays", "unpadded"]

Ints: TypeAlias = npt.NDArray[np.int64]
Flags: TypeAlias = npt.NDArray[np.bool_]


@dataclass
class TokenRows:
    """The rows that a forward contributes, ordered by sample and position."""

    shape: tuple[int, int]
    """Samples and columns of the forward's token ids."""
    sample: Ints
    """Place of each row's sample in the batch."""
    column: Ints
    position: Ints
    token_id: Ints
    kind: Ints
    special: Ints
    keys: list[Ints] = field(default_factory=list)
    """The unpadded columns of each sample up to here, as its attention sees them."""

    def __len__(self) -> int:
        return len(self.sample)

    @classmethod
    def merged(cls, parts: list[TokenRows]) -> TokenRows:
        """The rows of several forwards by sample; within a sample in the order they came."""
        if len(parts) == 1:
            return parts[0]
        order = merged_order(parts)

        def joined(name: str) -> Ints:
            return np.concatenate([np.zeros(0, np.int64), *(getattr(part, name) for part in parts)])[order]

        where = joined("sample"), joined("column"), joined("position")
        return cls((0, 0), *where, joined("token_id"), joined("kind"), joined("special"))

    def runs(self) -> list[tuple[int, int, int]]:
        """The rows as (sample, first column, column after the last)."""
        if not len(self):
            return []
        breaks = np.flatnonzero((np.diff(self.sample) != 0) | (np.diff(self.column) != 1)) + 1
        edges = [0, *breaks.tolist(), len(self)]
        return [
            (int(self.sample[start]), int(self.column[start]), int(self.column[stop - 1]) + 1)
            for start, stop in itertools.pairwise(edges)
        ]

    def gather(self, value: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Copy these rows of ``value`` (samples, columns, d) to host memory as ``dtype``: (n, d).

        One copy, cast on the way. From a GPU it goes to pinned memory and is complete when the stream is.
        """
        width = value.shape[-1]
        out = torch.empty((len(self), width), dtype=dtype, pin_memory=value.is_cuda)
        if len(self) == self.shape[0] * self.shape[1]:
            out.view(*self.shape, width).copy_(value, non_blocking=True)
            return out
        runs = self.runs()
        if len(runs) > 4 * self.shape[0]:
            sample, column = (
                torch.from_numpy(index).to(value.device) for index in (self.sample, self.column)
            )
            return out.copy_(value[sample, column], non_blocking=True)
        start = 0
        for row, first, last in runs:
            out[start : start + last - first].copy_(value[row, first:last], non_blocking=True)
            start += last - first
        return out


def merged_order(parts: list[TokenRows]) -> Ints:
    """What sorts the concatenated rows of several forwards by sample."""
    return np.argsort(
        np.concatenate([np.zeros(0, np.int64), *(part.sample for part in parts)]), kind="stable"
    )


def unpadded(mask: Any, shape: tuple[int, int], past: int, seen: Ints) -> tuple[Flags, Ints, Flags]:
    """Which columns of a forward are tokens, their positions, and which columns its attention sees.

    Args:
        mask: attention mask (samples, columns), with the cached columns or without; None where all are
            tokens.
        shape: samples and columns of the forward's token ids.
        past: columns in the cache.
        seen: tokens of each sample so far.

    Returns:
        tokens (samples, columns), positions (samples, columns), attended (samples, cached and these columns).
    """
    samples, columns = shape
    mask = np.ones((samples, past + columns), bool) if mask is None else np.asarray(mask)
    if mask.ndim != 2 or mask.shape[0] != samples or mask.shape[1] not in (columns, past + columns):
        raise ShapeError(
            f"attention_mask: expected shape ({samples}, {past + columns}), found {tuple(mask.shape)}. "
            f"Capture reads the padding from a mask with one entry per token"
        )
    mask = mask.astype(bool)
    if mask.shape[1] == past + columns:
        return mask[:, past:], (mask.cumsum(1) - 1)[:, past:], mask
    attended = np.concatenate([np.ones((samples, past), bool), mask], 1)
    return mask, mask.cumsum(1) - 1 + seen[:, None], attended


def row_arrays(ordinals: npt.ArrayLike, **columns: npt.ArrayLike) -> dict[str, npt.NDArray[Any]]:
    """The row table as the store takes it; a column that is not given is zero."""
    sample = np.asarray(ordinals, np.uint64)
    arrays: dict[str, npt.NDArray[Any]] = {"sample": sample}
    for name, dtype in (("position", "u4"), ("token_id", "u4"), ("kind", "u1"), ("special", "u1")):
        arrays[name] = np.ascontiguousarray(np.broadcast_to(columns.get(name, 0), sample.shape), dtype)
    return arrays

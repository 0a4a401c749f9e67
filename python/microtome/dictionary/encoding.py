"""Sparse codes of a dictionary, block by block: what :meth:`microtome.SAE.encode` does."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from microtome.dictionary import forward
from microtome.dictionary.weights import rows_of
from microtome.metrics.codes import RaggedCodes, SparseCodes

if TYPE_CHECKING:
    from microtome.dictionary.sae import SAE

__all__ = ["encode"]

_BLOCK_ENTRIES = 1 << 25  # pre-activations held at once


def encode(sae: SAE, x: Any) -> SparseCodes | RaggedCodes:
    """Codes of all rows of ``x``: ``k`` slots per row for a Top-K, ragged rows otherwise."""
    block_rows = max(1, _BLOCK_ENTRIES // sae.d_sae)
    with torch.no_grad():
        parts = [
            _entries(forward.encode_dense(block.to(sae.device, torch.float32), sae.tensors, sae.recipe))
            for block in rows_of(x, block_rows)
        ]
    counts, indices, values = (np.concatenate([part[i] for part in parts]) for i in range(3))
    if sae.recipe.activation == "topk" and sae.k is not None:
        return _slots(counts, indices, values, sae.k, sae.d_sae)
    indptr = np.concatenate([np.zeros(1, np.int64), np.cumsum(counts, dtype=np.int64)])
    return RaggedCodes(indptr, indices, values, sae.d_sae)


def _entries(dense: Tensor) -> tuple[npt.NDArray[Any], ...]:
    """Entries per row, then features and values, each row largest first and ties by lower index."""
    row, feature = dense.nonzero(as_tuple=True)
    value = dense[row, feature]
    order = torch.sort(value, descending=True, stable=True).indices
    order = order[torch.sort(row[order], stable=True).indices]
    counts = torch.bincount(row, minlength=len(dense))
    return counts.cpu().numpy(), feature[order].cpu().numpy().astype(np.uint32), value[order].cpu().numpy()


def _slots(
    counts: npt.NDArray[Any], indices: npt.NDArray[Any], values: npt.NDArray[Any], k: int, d_sae: int
) -> SparseCodes:
    slot = np.arange(k)[None, :] < counts[:, None]  # (n, k)
    placed = np.zeros(slot.shape, np.uint32), np.zeros(slot.shape, np.float32)
    for array, entries in zip(placed, (indices, values), strict=True):
        array[slot] = entries
    return SparseCodes(*placed, d_sae)

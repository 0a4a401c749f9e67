"""Sparse codes of a dictionary: what :meth:`microtome.SAE.encode` does.

On the CPU the packed Rust encoder, made once per dictionary: the recipe's scale, norms and thresholds are
brought to its terms first. On another device, torch in blocks, where the weights are.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from microtome.dictionary import folds, forward
from microtome.dictionary.parameters import Parameters
from microtome.dictionary.weights import rows_of
from microtome.metrics.codes import RaggedCodes, SparseCodes
from microtome.metrics.encode import TopKEncoder

__all__ = ["PackedEncoder", "encode_on_device", "joined"]

_BLOCK_ROWS = 65_536
_BLOCK_ENTRIES = 1 << 25  # pre-activations held at once on a device

_Vector = npt.NDArray[Any]


class PackedEncoder:
    """A dictionary's encoder in Rust, and what the recipe does before and after it."""

    def __init__(self, parameters: Parameters) -> None:
        tensors, recipe = parameters.tensors, parameters.recipe
        self.recipe, self.tensors = recipe, tensors
        topk = parameters.slots is not None
        self.norms = tensors["W_dec"].norm(dim=1)  # (d_sae,)
        tensors, recipe = folds.bare_threshold(tensors, recipe)
        scale, bias = recipe.input_scale, tensors["b_gate" if recipe.activation == "gated" else "b_enc"]
        W_enc, norms = tensors["W_enc"] * scale, None
        if recipe.norm_aware and topk:
            silent = self.norms == 0  # a score of zero is never chosen, and the encoder takes positive norms
            norms = torch.where(silent, torch.ones_like(self.norms), self.norms)
            W_enc, bias = W_enc.masked_fill(silent, 0), bias.masked_fill(silent, 0)
        threshold = tensors.get("threshold")
        if threshold is not None and recipe.norm_aware:  # codes carry the norm, and so does the threshold
            threshold = threshold / self.norms.clamp(min=torch.finfo(threshold.dtype).tiny)
            threshold = threshold.clamp(max=torch.finfo(threshold.dtype).max)
        self.encoder = TopKEncoder(
            W_enc,
            bias,
            parameters.slots,
            b_dec=tensors["b_dec"] / scale if recipe.apply_b_dec_to_input else None,
            norms=norms,
            activation="topk" if topk else "relu" if threshold is None else "jump_relu",
            threshold=threshold,
        )

    def __call__(self, x: Any) -> SparseCodes | RaggedCodes:
        """Codes of rows ``(n, d_in)``."""
        if self.recipe.normalize == "none":
            return self._finished(self.encoder(x))
        parts = [self.encoder(self._normalized(block.float())) for block in rows_of(x, _BLOCK_ROWS)]
        return self._finished(joined(parts))

    def _normalized(self, x: Tensor) -> Tensor:
        plain = self.recipe.replace(input_scale=1.0, apply_b_dec_to_input=False)
        return forward.encoder_input(x, self.tensors, plain)

    def _finished(self, codes: Any) -> SparseCodes | RaggedCodes:
        """Magnitudes of a gated dictionary; codes times the decoder norm where the recipe rescales them."""
        if self.recipe.activation == "gated":
            codes = self._magnitudes(codes)
        if not self.recipe.rescale_acts_by_decoder_norm:
            return codes  # type: ignore[no-any-return]
        scaled = codes.values * self.norms.numpy()[codes.indices]
        if isinstance(codes, SparseCodes):
            return SparseCodes(codes.indices, scaled, codes.d_sae)
        return _ragged(np.diff(codes.indptr), codes.indices, scaled, codes.d_sae)

    def _magnitudes(self, gates: RaggedCodes) -> RaggedCodes:
        names = ("b_gate", "r_mag", "b_mag")
        b_gate, r_mag, b_mag = (self.tensors[name].double().numpy()[gates.indices] for name in names)
        magnitudes = ((gates.values - b_gate) * np.exp(r_mag) + b_mag).astype(np.float32)
        return _ragged(np.diff(gates.indptr), gates.indices, magnitudes, gates.d_sae)


def joined(parts: list[Any]) -> SparseCodes | RaggedCodes:
    """Codes of one block of rows after the other as one."""
    first = parts[0]
    if isinstance(first, SparseCodes):
        indices, values = (
            np.concatenate([getattr(p, name) for p in parts]) for name in ("indices", "values")
        )
        return SparseCodes(indices, values, first.d_sae)
    counts, indices, values = (
        np.concatenate(arrays)
        for arrays in zip(*((np.diff(p.indptr), p.indices, p.values) for p in parts), strict=True)
    )
    return _ragged(counts, indices, values, first.d_sae)


def _ragged(counts: _Vector, indices: _Vector, values: _Vector, d_sae: int) -> RaggedCodes:
    """Ragged codes in order: positive entries, each row largest first, ties by lower index."""
    row = np.repeat(np.arange(len(counts)), counts)
    keep = values > 0
    row, indices, values = row[keep], indices[keep], values[keep]
    order = np.lexsort((indices, -values, row))
    indptr = np.concatenate([np.zeros(1, np.int64), np.cumsum(np.bincount(row, minlength=len(counts)))])
    return RaggedCodes(indptr, indices[order], values[order], d_sae)


def encode_on_device(sae: Parameters, x: Any) -> SparseCodes | RaggedCodes:
    """Codes of all rows of ``x`` by torch, where the weights are: ``slots`` per row, or ragged rows."""
    parts = []
    with torch.no_grad():
        for block in rows_of(x, max(1, _BLOCK_ENTRIES // sae.d_sae)):
            dense = forward.encode_dense(block.to(sae.device, torch.float32), sae.tensors, sae.recipe)
            row, feature = dense.nonzero(as_tuple=True)
            fired = torch.bincount(row, minlength=len(dense)).cpu().numpy()
            parts.append((fired, feature.cpu().numpy().astype(np.uint32), dense[row, feature].cpu().numpy()))
    counts, features, values = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    ragged = _ragged(counts, features, values, sae.d_sae)
    if sae.slots is None:
        return ragged
    slot = np.arange(sae.slots)[None, :] < np.diff(ragged.indptr)[:, None]  # (n, k)
    filled = np.zeros(slot.shape, np.uint32), np.zeros(slot.shape, np.float32)
    filled[0][slot], filled[1][slot] = ragged.indices, ragged.values
    return SparseCodes(*filled, sae.d_sae)

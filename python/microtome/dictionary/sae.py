"""The dictionary object: weights, recipe, encode, decode.

Rows are encoded by the packed Rust encoder, which gives sparse codes; :meth:`SAE.encode_torch` and
:meth:`SAE.module` are the same function in torch, dense and differentiable, on any device.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from microtome.dictionary import checks, encoding, folds, formats, forward, weights
from microtome.dictionary.encoding import PackedEncoder
from microtome.dictionary.module import SAEModule
from microtome.dictionary.parameters import Parameters
from microtome.errors import CheckpointError, DtypeError, ShapeError
from microtome.metrics.codes import RaggedCodes, SparseCodes
from microtome.store import StoredCodes, StoredRaggedCodes

__all__ = ["SAE", "SAEModule"]

_BLOCK_ROWS = 16_384


class SAE(Parameters):
    """A sparse autoencoder or transcoder: its tensors, and the recipe that says how they are used.

    Tensors are float32 torch tensors in SAELens' orientation: ``W_enc (d_in, d_sae)``, ``W_dec (d_sae,
    d_out)``, ``b_enc (d_sae,)``, ``b_dec (d_out,)``, ``threshold (d_sae,)``; ``b_gate``, ``b_mag``, ``r_mag``
    of a gated dictionary; ``W_skip (d_out, d_in)``.

    Args:
        W_enc: encoder weights ``(d_in, d_sae)``: tensor or array, any float type.
        W_dec: decoder weights ``(d_sae, d_out)``.
        b_enc: encoder bias ``(d_sae,)``; zeros when left out.
        b_dec: decoder bias ``(d_out,)``; zeros when left out.
        recipe: how the weights are used. Left out, the remaining arguments make one: ``SAE(W_enc, W_dec,
            activation="topk", k=50)``.
        tensors: further tensors by name (``threshold``, ``b_gate``, ``b_mag``, ``r_mag``, ``W_skip``).
        fields: fields of :class:`Recipe`.

    Raises:
        ShapeError: tensors that do not fit together; the message names both.
        NonFiniteError: NaN or infinity among the weights.

    Example:
        >>> import torch, microtome as mt
        >>> W = torch.nn.functional.normalize(torch.randn(64, 16), dim=1)
        >>> sae = mt.SAE(W.T, W, activation="topk", k=4)
        >>> sae.encode_torch(torch.randn(3, 16)).count_nonzero(dim=1).max() <= 4
        tensor(True)
    """

    _handed_out = False
    _packed: tuple[list[tuple[int, int]], PackedEncoder] | None = None

    # --- encode and decode ----------------------------------------------------------------------------------

    def encode(self, x: Any) -> SparseCodes | RaggedCodes:
        """Sparse codes of rows, by the packed Rust encoder.

        Args:
            x: rows ``(n, d_in)``: a tensor, an array, or :class:`microtome.Activations`; bf16, f16 or f32.

        Returns:
            ``(n, k)`` indices and values for Top-K dictionaries; ragged rows for the others.

        Raises:
            ShapeError: rows of another width; the message names both.
            HookError: activations of a store at another hook than the dictionary's.
        """
        checks.check_rows(x, self.recipe, self.d_in)
        return self.packed()(x) if self.device.type == "cpu" else encoding.encode_on_device(self, x)

    def packed(self) -> PackedEncoder:
        """The Rust encoder of this dictionary, made at the first use and again after its weights changed.

        Once :meth:`module` has handed the weights out it is made at every call: nobody tells when they
        change.
        """
        state = [(tensor.data_ptr(), tensor._version) for tensor in self.tensors.values()]
        if self._packed is None or self._packed[0] != state or self._handed_out:
            self._packed = (state, PackedEncoder(self))
        return self._packed[1]

    def encode_torch(self, x: Any) -> Tensor:
        """The same codes in torch: dense ``(n, d_sae)``, on the dictionary's device, differentiable."""
        checks.check_rows(x, self.recipe, self.d_in)
        return forward.encode_dense(self._rows(x), self.tensors, self.recipe)

    def decode(self, codes: Any, x: Any = None) -> Tensor:
        """Reconstruction ``(n, d_out)``, float32.

        Args:
            codes: sparse codes of n rows, in memory or in a store (read as a whole), or dense ones ``(n, d_sae)``.
            x: the rows, where the recipe looks at them again (a skip connection, a normalisation of every
                row).

        Raises:
            ShapeError: codes of another number of features, or rows missing.
        """
        if x is None and ("W_skip" in self.tensors or self.recipe.normalize != "none"):
            raise ShapeError(
                f"x: expected the rows (n, {self.d_in}), found None. "
                "A dictionary with a skip connection or a row normalisation needs them to decode"
            )
        rows = None if x is None else self._rows(x)
        if isinstance(codes, StoredCodes | StoredRaggedCodes):
            codes = codes[:]
        if hasattr(codes, "to_csr"):
            if codes.d_sae != self.d_sae:
                raise ShapeError(
                    f"codes: expected {self.d_sae} features as in this dictionary, found {codes.d_sae}"
                )
            indptr, indices, values = (torch.from_numpy(np.array(part)) for part in codes.to_csr())
            where = indptr.long().to(self.device), indices.long().to(self.device)
            return forward.decode_ragged(*where, values.to(self.device), self.tensors, self.recipe, rows)
        dense = self._rows(codes)
        if dense.shape[1] != self.d_sae:
            raise ShapeError(
                f"codes: expected {self.d_sae} features as in this dictionary, found {dense.shape[1]}"
            )
        return forward.decode_dense(dense, self.tensors, self.recipe, rows)

    def reconstruct(self, x: Any) -> Tensor:
        """``decode(encode(x))`` in torch, ``(n, d_out)``, differentiable in ``x``."""
        rows = self._rows(x)
        return forward.decode_dense(self.encode_torch(rows), self.tensors, self.recipe, rows)

    def module(self) -> SAEModule:
        """A torch module over the same memory: training it trains this dictionary."""
        self._handed_out = True
        return SAEModule(self)

    # --- folds ----------------------------------------------------------------------------------------------

    def to_jumprelu(self, x: Any) -> SAE:
        """A Top-K or BatchTopK dictionary as JumpReLU that keeps ``k`` features per row of ``x`` on average.

        ``θ`` is the (k·n)-th largest score over the calibration rows, ``θ_f = θ / ‖W_dec,f‖`` for norm-aware
        dictionaries (Llama Scope). A score equal to the (k·n)-th largest still fires.

        Raises:
            CheckpointError: the dictionary has no ``k``.
        """
        checks.check_rows(x, self.recipe, self.d_in)
        blocks = weights.rows_of(x, _BLOCK_ROWS)
        return self.with_tensors(*folds.to_jumprelu(self.tensors, self.recipe, blocks, int(x.shape[0])))

    # --- self-check -----------------------------------------------------------------------------------------

    def with_probe(self, x: Any) -> SAE:
        """This dictionary with rows to check itself against: their L0 and FVU are saved with it."""
        made = self.with_tensors(self.tensors)
        made.probe = self._rows(x).detach().cpu().clone()
        made.probe_targets = made.quality(made.probe)
        return made

    def quality(self, x: Any) -> dict[str, float]:
        """``l0`` (mean active features per row) and ``fvu`` (Σ‖x − x̂‖² / Σ‖x − x̄‖²) over rows ``x``."""
        rows = self._rows(x).detach()
        with torch.no_grad():
            codes = self.encode_torch(rows)
            x_hat = forward.decode_dense(codes, self.tensors, self.recipe, rows)
        l0 = float((codes > 0).sum() / len(rows))
        if self.d_in != self.d_out:  # a transcoder writes something else than its rows
            return {"l0": l0, "fvu": float("nan")}
        spread = (rows.double() - rows.double().mean(0)).square().sum()
        error = (rows.double() - x_hat.double()).square().sum()
        return {"l0": l0, "fvu": float(error / spread) if spread > 0 else float("nan")}

    def self_check(self) -> dict[str, float]:
        """L0 and FVU of the probe rows, checked against what the file says they were.

        Returns:
            ``{"l0": ..., "fvu": ...}`` as measured; empty when the file carries no probe rows.

        Raises:
            CheckpointError: L0 is off by more than 1 %, or FVU by more than 1e-3: the weights are read in
                another way than they were written.
        """
        if self.probe is None:
            return {}
        found = self.quality(self.probe)
        for name, slack in (("l0", 0.01 * abs(self.probe_targets.get("l0", 0.0)) + 1e-6), ("fvu", 1e-3)):
            wanted = self.probe_targets.get(name, float("nan"))
            if abs(found[name] - wanted) > slack:  # False for NaN, which a transcoder's FVU is
                raise CheckpointError(
                    f"self-check of {self!r}: expected {name} {wanted:.6g} on {len(self.probe)} probe rows, "
                    f"found {found[name]:.6g}. The file was read by another recipe than it was written with"
                )
        return found

    # --- files ----------------------------------------------------------------------------------------------

    @classmethod
    def load_from_disk(
        cls,
        path: str | Path,
        format: str | None = None,  # noqa: A002
        *,
        k: int | None = None,
        device: str = "cpu",
    ) -> SAE:
        """A dictionary from a file or folder of any known format, told by its keys.

        Formats: ``microtome``, ``saelens``, ``sparsify``, ``dictionary_learning``, ``llama_scope``,
        ``llamascopium``, ``gemma_scope``, ``gemma_scope_2``, ``qwen_scope``, ``goodfire``, ``circuit_tracer``.

        Args:
            path: the file, or the folder with weights and configuration.
            format: demand this format instead of telling it by the keys.
            k: features per row, for formats whose files do not say it (Qwen Scope).
            device: where the tensors go.

        Raises:
            CheckpointError: unknown format, missing tensor or configuration, or a self-check that failed.
            UnsafeCheckpointError: a pickle that holds more than tensors.
            ShapeError: tensors that do not fit together.
        """
        held = formats.load(Path(path), format, k)
        sae = cls(held.W_enc, held.W_dec, recipe=held.recipe, tensors=held.others)
        sae.probe, sae.probe_targets = held.probe, held.probe_targets
        sae.self_check()
        return sae.to(device)

    def save_to_disk(self, path: str | Path, format: str = "microtome") -> Path:  # noqa: A002
        """Write this dictionary in one of the formats of :meth:`load_from_disk`.

        What a format cannot say is folded into the weights where that is exact, and refused where it is not.

        Returns:
            The weights file.

        Raises:
            CheckpointError: the format has no place for this recipe.
        """
        return formats.save(self, Path(path), format)

    # --- checks ---------------------------------------------------------------------------------------------

    def _rows(self, x: Any) -> Tensor:
        rows = x if isinstance(x, Tensor) else torch.cat(list(weights.rows_of(x, _BLOCK_ROWS)))
        if rows.dtype == torch.float64 and self.W_enc.dtype != torch.float64:
            raise DtypeError(
                "x: expected float32, float16 or bfloat16, found float64. Cast it, e.g. .float()"
            )
        return rows.to(self.device, self.W_enc.dtype)

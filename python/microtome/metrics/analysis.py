"""Everything about a dictionary's features in one pass over the activations."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from microtome import _core, tensors
from microtome import progress as progress_bar
from microtome.arguments import whole
from microtome.errors import DtypeError, ShapeError
from microtome.metrics.features import Codes, FeatureStats, core_codes, counted_from, firing_stats, part
from microtome.metrics.reconstruction import Decoder, finished_fvu
from microtome.metrics.rowtable import By, RowTable, grouping
from microtome.metrics.samples import RowLabels, row_labels, top_table

if TYPE_CHECKING:
    import polars as pl

__all__ = ["Analysis", "analyse"]

_BLOCK_ROWS = 16 * _core.FVU_BLOCK_ROWS
"""Rows that go through together: whole blocks of the FVU's grid, for the bits of separate passes."""

Encode: TypeAlias = Callable[[Any], Codes]


@dataclass(frozen=True, eq=False)
class Analysis:
    """What one pass of :func:`analyse` found."""

    stats: FeatureStats | dict[Any, FeatureStats]
    """Statistics of all rows, or of each group."""
    top: pl.DataFrame | None
    """Table of :func:`top_samples`; None where ``top=0``."""
    fvu: float
    """Fraction of variance unexplained over all rows; NaN without a decoder."""
    n_rows: int
    """Rows analysed."""

    @property
    def l0(self) -> float:
        """Mean number of features that fire on a token."""
        groups = self.stats.values() if isinstance(self.stats, dict) else [self.stats]
        return sum(int(stats.fires.sum()) for stats in groups) / self.n_rows


def analyse(
    x: Any,
    encoder: Any,
    *,
    W_dec: Any = None,
    b_dec: Any = None,
    by: By = None,
    rows: RowTable = None,
    top: int = 20,
    progress: bool = True,
) -> Analysis:
    """Encode, count, rank and reconstruct in one pass: every row is read once, and its codes are not kept.

    Rows go through in blocks of a few thousand; a block's activations and codes are in cache while they are
    counted and decoded. Memory does not grow with the rows, but for 16 bytes each of labels (sample,
    position, group). Numbers are those of :func:`feature_stats`, :func:`top_samples` and :func:`fvu`, bit for bit.

    Args:
        x: activations (n, d_in): tensor, array or activations of a store.
        encoder: a dictionary with ``encode`` and ``decode`` (:class:`microtome.SAE`), or an encoder that maps
            rows to codes (:class:`TopKEncoder`).
        W_dec: decoder (d_sae, d_in) for the FVU, where ``encoder`` has no ``decode``.
        b_dec: bias of that decoder, (d_in,).
        by: groups the rows, as in :func:`feature_stats`.
        rows: row table with ``sample`` and ``position``; that of ``x`` where it has one. Without any, every
            row stands for a sample of its own.
        top: samples per feature in the table of top samples; 0 for none.
        progress: show a bar on a terminal.

    Raises:
        ShapeError: no rows; shapes that do not fit; an encoder whose codes of a row depend on other rows.
        NonFiniteError: NaN or infinity among the activations.

    Example:
        >>> from microtome.metrics import TopKEncoder
        >>> x, eye = np.ones((3, 2), np.float32), np.eye(2, dtype=np.float32)
        >>> analyse(x + np.arange(3, dtype=np.float32)[:, None], TopKEncoder(eye, k=2), W_dec=eye).fvu
        0.0
    """
    n = len(x)
    if n == 0:
        raise ShapeError("x: expected at least one row, found no rows selected")
    top = whole(top, "top")
    encode, reconstruct = _encoding(encoder), _reconstruction(encoder, W_dec, b_dec)
    table = getattr(x, "rows", None) if rows is None else rows
    groups = grouping(by, table, n)
    labels = _labels(table, n) if top else None
    n_groups, d_sae = 1 if groups is None else len(groups.keys), encoder.d_sae
    firing = _core.FiringState(d_sae, n_groups, n)
    best = _core.TopState(d_sae, n_groups, top, True) if labels else None
    variance = _core.FvuState() if reconstruct else None
    with progress_bar.bar("analyse", n, progress) as done:
        for start in range(0, n, _BLOCK_ROWS):
            span = slice(start, min(n, start + _BLOCK_ROWS))
            block = tensors.source_rows(x, span)
            _announce(x, span.stop, min(n, span.stop + _BLOCK_ROWS))
            with counted_from(start):
                codes = encode(block)
            core = core_codes(codes)
            firing.update(core, part(groups, span))
            if best and labels:
                best.update(core, labels.samples[span], labels.positions[span], part(groups, span))
            if variance and reconstruct:
                reconstruct(variance, block, codes)
            done(span.stop)
    return Analysis(
        stats=firing_stats(firing, groups, n),
        top=top_table(best, labels, groups) if best and labels else None,
        fvu=finished_fvu(variance) if variance else math.nan,
        n_rows=n,
    )


def _announce(x: Any, start: int, stop: int) -> None:
    """Have the next rows of a store fetched from disk while these are encoded."""
    if hasattr(x, "_selection"):
        x._selection.will_need(start, stop)


def _encoding(encoder: Any) -> Encode:
    """Rows to codes, row by row.

    Raises:
        DtypeError: neither a dictionary nor an encoder.
        ShapeError: the codes of a row depend on the other rows of the call.
    """
    if not hasattr(encoder, "d_sae") or not (callable(encoder) or hasattr(encoder, "encode")):
        raise DtypeError(f"encoder: expected an SAE or a TopKEncoder, found {type(encoder).__name__}")
    if getattr(encoder, "activation", None) == "batch_topk":
        raise ShapeError(
            "encoder: expected codes of one row at a time, found batch_topk. Convert it to jump_relu"
        )
    if hasattr(encoder, "encode"):
        return encoder.encode  # type: ignore[no-any-return]
    return lambda block: encoder(block, progress=False)


def _reconstruction(
    encoder: Any, W_dec: Any, b_dec: Any
) -> Callable[[_core.FvuState, Any, Codes], None] | None:
    """Adds a block and its codes to the FVU; None where nothing says how to decode."""
    if W_dec is not None:
        decoder = Decoder.of(W_dec, b_dec)

        def fused(state: _core.FvuState, block: Any, codes: Codes) -> None:
            source = tensors.core_source(block, "x")
            state.update_codes(source, core_codes(codes), decoder.W_dec, decoder.b_dec)

        return fused
    if b_dec is not None:
        raise ShapeError("W_dec: expected a decoder (d_sae, d_in) to go with b_dec, found None")
    if not hasattr(encoder, "decode"):
        return None

    def whole(state: _core.FvuState, block: Any, codes: Codes) -> None:
        x_hat = encoder.decode(codes, block)
        state.update(tensors.core_source(block, "x"), tensors.core_source(x_hat, "x_hat"))

    return whole


def _labels(table: RowTable, n: int) -> RowLabels:
    if table is None:
        return RowLabels(np.arange(n, dtype=np.uint64), np.zeros(n, np.uint32), None)
    return row_labels(table, n)

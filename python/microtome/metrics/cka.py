r"""Linear CKA: how similar two representations of the same rows are, up to rotation, scale and offset.

.. math::
    \mathrm{CKA}(X, Y) = \frac{\mathrm{HSIC}(K, L)}{\sqrt{\mathrm{HSIC}(K, K)\,\mathrm{HSIC}(L, L)}},
    \qquad K = X X^\top, \quad L = Y Y^\top

Kornblith et al., *Similarity of Neural Network Representations Revisited*, ICML 2019. The debiased form puts
the U-statistic of Song et al. (JMLR 2012) in place of HSIC: independent representations score 0 on average,
where the biased form scores near 1 once they are wider than there are rows.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt

from microtome import _core, tensors
from microtome.arguments import flag, required_bytes
from microtome.errors import ShapeError
from microtome.metrics.undefined import warn_undefined
from microtome.progress import bar

__all__ = ["cka_matrix", "linear_cka"]

Float64 = npt.NDArray[np.float64]

MEMORY_BUDGET = 1 << 30
"""Bytes that a computation may use beyond its inputs, unless told otherwise."""


def linear_cka(
    x: Any, y: Any, debiased: bool = True, *, memory_budget: int | str = MEMORY_BUDGET, progress: bool = True
) -> float:
    """Linear CKA of two representations of the same rows, exact over all of them.

    Args:
        x: (n, d_x) tensor, array or :class:`~microtome.Activations`, of float32, float16 or bfloat16.
        y: (n, d_y), row ``i`` belonging to row ``i`` of ``x``.
        debiased: take the U-statistic, which needs 4 rows; else the biased estimator of Kornblith et al.
        memory_budget: bytes, or text such as ``"2GiB"``, to use beyond the inputs. Where it has no room for the cheaper
            of two forms the other one is taken, and the last bits differ.
        progress: draw a bar on a terminal.

    Returns:
        At most 1. Debiased values of unrelated representations scatter around 0 and may be negative: nothing
        is clamped. NaN, with an :class:`~microtome.errors.UndefinedWarning`, when ``x`` or ``y`` is
        constant.

    Raises:
        ShapeError: rows differ, or there are fewer than 4 (2 when not debiased).
        NonFiniteError: NaN or infinity in the input.
        MemoryError: the budget has no room for the smallest plan.

    Example:
        >>> x = np.random.default_rng(0).standard_normal((100, 8), dtype=np.float32)
        >>> round(linear_cka(x, 3 * x + 1), 6)
        1.0
    """
    pair = [("x", tensors.core_source(x, "x"))], [("y", tensors.core_source(y, "y"))]
    values = _matrix(*pair, debiased, memory_budget, progress)
    return float(values[0, 0])


def cka_matrix(
    xs: Iterable[Any],
    ys: Iterable[Any] | None = None,
    debiased: bool = True,
    *,
    memory_budget: int | str = MEMORY_BUDGET,
    progress: bool = True,
) -> Float64:
    """Linear CKA of every representation in ``xs`` with every one in ``ys``, in one pass where memory allows.

    Args:
        xs: representations of the same rows, as :func:`linear_cka` takes them; widths may differ.
        ys: a second list, or None for all pairs of ``xs``.
        debiased: as in :func:`linear_cka`.
        memory_budget: as in :func:`linear_cka`. With less, the rows are read more often, to the same result; where
            it has no room for the cheaper of two forms the other one is taken, and the last bits differ.
        progress: draw a bar on a terminal.

    Returns:
        (len(xs), len(ys)) float64. Rows and columns of a representation that does not vary are NaN, and an
        :class:`~microtome.errors.UndefinedWarning` names it.

    Raises:
        ShapeError: an empty list, rows differ, or there are fewer than 4 (2 when not debiased).
        NonFiniteError: NaN or infinity in the input.
        MemoryError: the budget has no room for the smallest plan.

    Example:
        >>> x = np.random.default_rng(0).standard_normal((100, 8), dtype=np.float32)
        >>> cka_matrix([x, x[:, :4], -x]).shape
        (3, 3)
    """
    return _matrix(
        named(xs, "xs"), None if ys is None else named(ys, "ys"), debiased, memory_budget, progress
    )


def named(layers: Iterable[Any], name: str) -> list[tuple[str, Any]]:
    """Layers as the core takes them, each with its name in messages."""
    listed = [(f"{name}[{i}]", layer) for i, layer in enumerate(layers)]
    if not listed:
        raise ShapeError(f"{name}: expected at least one representation (n, d), found none")
    return [(label, tensors.core_source(layer, label)) for label, layer in listed]


def rows_of(layers: list[tuple[str, Any]]) -> int:
    """Rows of the first layer: the steps of a progress bar."""
    return len(tensors.memory(layers[0][1]))


def _matrix(
    xs: list[tuple[str, Any]],
    ys: list[tuple[str, Any]] | None,
    debiased: bool,
    memory_budget: int | str,
    progress: bool,
) -> Float64:
    options = flag(debiased, "debiased"), required_bytes(memory_budget)
    tensors.refuse_shifted_rows((*xs, *(ys or [])))
    with bar("CKA", rows_of(xs), progress) as done:
        values, undefined = _core.cka_matrix(xs, ys, *options, done)
    if undefined:
        names = [name for name, _ in (*xs, *(ys or []))]
        warn_undefined("CKA", "its HSIC with itself is not positive", [names[i] for i in undefined], 4)
    return values

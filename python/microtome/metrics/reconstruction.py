"""How much of the activations a dictionary leaves unexplained."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from microtome import _core, tensors
from microtome import progress as progress_bar
from microtome.errors import ShapeError
from microtome.metrics.features import code_blocks, counted_from, n_rows, offset
from microtome.metrics.undefined import warn_undefined

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

__all__ = ["Decoder", "finished_fvu", "fvu"]


def fvu(x: Any, x_hat: Any, *, W_dec: Any = None, b_dec: Any = None, progress: bool = True) -> float:
    r"""Fraction of variance unexplained, sum over sum.

    :math:`FVU = \sum_t \|x_t - \hat x_t\|^2 / \sum_t \|x_t - \bar x\|^2`, with the mean over the same rows,
    in float64 (blocks are joined by Chan's rule, so a mean far above the spread loses no digits). 0 is
    perfect, 1 as good as the mean. With sparse codes for ``x_hat``, rows are decoded and compared on the way.

    Args:
        x: activations (n, d_in): tensor, array or activations of a store; float32, float16 or bfloat16.
        x_hat: reconstructions of the same shape, or sparse codes of n rows.
        W_dec: decoder (d_sae, d_in), with sparse codes.
        b_dec: decoder bias (d_in,), with sparse codes; zero where None.
        progress: show a bar on a terminal.

    Returns:
        The fraction; NaN, with an :class:`~microtome.errors.UndefinedWarning`, where ``x`` does not vary.

    Raises:
        ShapeError: no rows, or shapes that do not fit each other.
        NonFiniteError: NaN or infinity in any argument.

    Example:
        >>> import numpy as np
        >>> x = np.array([[0.0, 1.0], [2.0, 3.0]], np.float32)
        >>> fvu(x, x), fvu(x, np.ones((2, 1), np.float32) * x.mean(0))
        (0.0, 1.0)
    """
    sparse = hasattr(x_hat, "indices") and hasattr(x_hat, "d_sae")
    if sparse and W_dec is None:
        raise ShapeError("W_dec: expected a decoder (d_sae, d_in) to go with sparse codes, found None")
    if not sparse and (W_dec is not None or b_dec is not None):
        raise ShapeError("x_hat: expected sparse codes to go with W_dec, found reconstructions")
    tensors.refuse_shifted_rows([("x", x), ("x_hat", x_hat)])
    state = _core.FvuState()
    with progress_bar.bar("fvu", len(x), progress) as done:
        if sparse:
            decoder = Decoder.of(W_dec, b_dec)
            if len(x) != n_rows(x_hat, "x_hat"):
                raise ShapeError(f"x_hat: expected codes of {len(x)} rows, as x, found {len(x_hat)}")
            stored = hasattr(x_hat, "blocks")
            for span, block in code_blocks(x_hat):
                # Of a store only what is decoded is read, a block at a time.
                some = x.take(span) if hasattr(x, "_selection") else x[span]
                source = tensors.core_source(some if stored else x, "x")
                with counted_from(span.start):
                    state.update_codes(source, block, decoder.W_dec, decoder.b_dec, offset(done, span.start))
        else:
            state.update(tensors.core_source(x, "x"), tensors.core_source(x_hat, "x_hat"), done)
    return finished_fvu(state)


@dataclass(frozen=True, eq=False)
class Decoder:
    """A decoder as the core takes it."""

    W_dec: tensors.CoreInput
    """(d_sae, d_in)."""
    b_dec: npt.NDArray[np.float32] | None
    """(d_in,), or None for zero."""

    @classmethod
    def of(cls, W_dec: Any, b_dec: Any) -> Decoder:
        """Weights and bias from tensors or arrays."""
        bias = None if b_dec is None else tensors.core_vector(b_dec, "b_dec")
        return cls(tensors.core_matrix(W_dec, "W_dec"), bias)


def finished_fvu(state: _core.FvuState, stacklevel: int = 4) -> float:
    """The fraction that a finished state holds; NaN, with a warning, where x does not vary."""
    error, variance = state.finish()
    if variance == 0:
        warn_undefined("fvu", "it does not vary", ["x"], stacklevel)
        return math.nan
    return error / variance

"""Exact sparse codes from activations, by a packed encoder.

The weights are packed once; each call then streams the rows through a low-precision screen that keeps every
feature it cannot rule out, and scores those few in float64. The codes are those of real arithmetic on the stored
numbers, the same bits for any number of threads and any instruction set.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
import numpy.typing as npt

from microtome import _core, tensors
from microtome.errors import ShapeError
from microtome.metrics.codes import RaggedCodes, SparseCodes
from microtome.progress import bar

__all__ = ["Activation", "Certificate", "EncodeReport", "TopKEncoder", "topk_encode"]

Activation: TypeAlias = Literal["topk", "batch_topk", "jump_relu", "relu"]
"""What of the pre-activations fires."""

Certificate: TypeAlias = Literal["deterministic", "dithered"]
"""What the screen's error bound rests on."""


@dataclass(frozen=True)
class EncodeReport:
    """What a call of an encoder did beside its result."""

    rows: int
    """Rows encoded."""
    candidates: int
    """Pairs of row and feature that the screen could not rule out and that were scored in float64."""
    candidates_per_k: float
    """Candidates per row and member wanted; NaN where ``k`` is not fixed."""
    misjudged_rate: float
    """Share of rows that were screened twice, because a threshold guessed from a sample of the features was too high. An
    encoder that misjudges often guesses less, so this and ``candidates`` depend on earlier calls; codes never do."""
    escape_rate: float
    """Share of rows that defeated the screen and took the float32 path."""
    isa: str
    """Instruction path: plain, neon, neondot, avx2, avx512, avx512bf16, avx512vnni or amx."""
    screen: str
    """Arithmetic of the screen: int8, int16, bfloat16 or float32."""
    seconds: dict[str, float]
    """Seconds, added up over threads, of ``rounding`` the rows, ``screening`` all features, and ``scoring`` what the
    screen left."""


class TopKEncoder:
    r"""An encoder with its weights packed: call it with activations, get sparse codes.

    The pre-activation of feature ``j`` is :math:`(x - b_{dec}) \cdot W_{enc,:,j} + b_{enc,j}`, computed in float64
    in a fixed order and rounded to float32.

    Args:
        W_enc: weights (d_in, d_sae), tensor or array of float32, float16 or bfloat16, as in SAELens.
        b_enc: bias (d_sae,), or None for zero.
        k: members per row, for ``"topk"`` and ``"batch_topk"``.
        b_dec: (d_in,), subtracted from every row first; None when the encoder does not centre its input.
        norms: (d_sae,), positive: members are chosen by pre-activation times norm, and the pre-activation is
            returned (for decoders that are not normalised).
        activation: ``"topk"`` keeps the k largest positive pre-activations of a row (Gao et al., arXiv
            2406.04093); ``"batch_topk"`` the ``k * n`` largest positive of all n rows of a call (Bussmann et al.,
            arXiv 2412.06410); ``"jump_relu"`` those above ``threshold`` and above zero (Rajamanoharan et al.,
            arXiv 2407.14435); ``"relu"`` those above zero.
        threshold: one number, or (d_sae,), for ``"jump_relu"``.
        certificate: ``"deterministic"``: the screen's bound always holds (Cauchy-Schwarz). ``"dithered"``: tighter
            at large ``d_in``, by dithered rounding; a bound fails with probability at most 1e-18 per row and
            feature (Hoeffding).

    Raises:
        ShapeError: a shape does not fit, or ``k`` lies outside 1 to d_sae.
        DtypeError: an element type other than float32, float16, bfloat16.
        NonFiniteError: NaN or infinity among the weights.

    Example:
        >>> encoder = TopKEncoder(np.eye(3, dtype=np.float32), None, k=2)
        >>> codes = encoder(np.array([[1.0, -1.0, 2.0]], np.float32))
        >>> codes.indices, codes.values
        (array([[2, 0]], dtype=uint32), array([[2., 1.]], dtype=float32))
    """

    def __init__(
        self,
        W_enc: Any,
        b_enc: Any = None,
        k: int | None = None,
        *,
        b_dec: Any = None,
        norms: Any = None,
        activation: Activation = "topk",
        threshold: Any = None,
        certificate: Certificate = "deterministic",
    ) -> None:
        weights = tensors.core_matrix(W_enc, "W_enc")
        d_in, d_sae = tensors.memory(weights).shape
        self.activation: Activation = activation
        self.k = _checked_k(k, d_sae, activation)
        self.last_report: EncodeReport | None = None
        self._encoder = _core.Encoder(
            weights,
            _vector(b_enc, "b_enc", d_sae),
            _vector(b_dec, "b_dec", d_in),
            _vector(norms, "norms", d_sae),
            _threshold(threshold, d_sae, activation),
            activation,
            self.k or 0,
            certificate,
        )

    @property
    def d_in(self) -> int:
        """Width of the input."""
        return self._encoder.d_in

    @property
    def d_sae(self) -> int:
        """Number of features."""
        return self._encoder.d_sae

    def __repr__(self) -> str:
        k = "" if self.k is None else f", k={self.k}"
        return f"TopKEncoder(d_in={self.d_in}, d_sae={self.d_sae}{k}, activation={self.activation!r})"

    def __call__(self, x: Any, *, progress: bool = True) -> Any:
        """Encode rows.

        Args:
            x: activations (n, d_in) of float32, float16 or bfloat16: tensor (any device), array, or
                :class:`microtome.Activations`.
            progress: show a bar on a terminal.

        Returns:
            :class:`SparseCodes` for ``"topk"``, :class:`RaggedCodes` for the other activations.
            :attr:`last_report` then holds candidates per k and the escape rate.

        Raises:
            ShapeError: ``x`` has another width than the encoder.
            NonFiniteError: NaN or infinity in ``x``, with row and column.
        """
        source = tensors.core_source(x, "x")
        with bar("encode", len(tensors.memory(source)), progress) as done:
            arrays, (rows, scored, misjudged, escaped), phases = self._encoder.encode(source, done)
        isa, screen = self._encoder.path
        self.last_report = EncodeReport(
            rows=rows,
            candidates=scored,
            candidates_per_k=scored / (rows * self.k) if self.k and rows else float("nan"),
            misjudged_rate=misjudged / rows if rows else 0.0,
            escape_rate=escaped / rows if rows else 0.0,
            isa=isa,
            screen=screen,
            seconds=dict(zip(("rounding", "screening", "scoring"), phases, strict=True)),
        )
        if self.activation == "topk":
            indices, values = arrays
            return SparseCodes(indices, values, self.d_sae)
        indptr, indices, values = arrays
        return RaggedCodes(indptr, indices, values, self.d_sae)


def topk_encode(x: Any, W_enc: Any, b_enc: Any = None, k: int | None = None, **options: Any) -> Any:
    """Encode rows with weights that are used once: ``TopKEncoder(W_enc, b_enc, k, **options)(x)``.

    Args:
        x: activations (n, d_in), as :meth:`TopKEncoder.__call__` takes them.
        W_enc: weights (d_in, d_sae).
        b_enc: bias (d_sae,), or None for zero.
        k: members per row.
        options: further arguments of :class:`TopKEncoder`, and ``progress``.

    Returns:
        :class:`SparseCodes`, or :class:`RaggedCodes` for activations without a fixed ``k``.

    Example:
        >>> topk_encode(np.ones((4, 2), np.float32), np.eye(2, dtype=np.float32), k=1)
        SparseCodes(n=4, k=1, d_sae=2)
    """
    progress = options.pop("progress", True)
    return TopKEncoder(W_enc, b_enc, k, **options)(x, progress=progress)


def _checked_k(k: int | None, d_sae: int, activation: str) -> int | None:
    if activation not in get_args(Activation):
        raise ShapeError(f"activation: expected topk, batch_topk, jump_relu or relu, found {activation!r}")
    if activation not in ("topk", "batch_topk"):
        if k is not None:
            raise ShapeError(f"k: expected None with activation {activation!r}, found {k}")
        return None
    if k is None or isinstance(k, bool) or not isinstance(k, int | np.integer) or not 1 <= k <= d_sae:
        raise ShapeError(f"k: expected 1 to d_sae = {d_sae}, found {k!r}")
    return int(k)


def _vector(x: Any, name: str, length: int) -> npt.NDArray[np.float32] | None:
    return None if x is None else tensors.core_vector(x, name, length)


def _threshold(threshold: Any, d_sae: int, activation: str) -> npt.NDArray[np.float32] | None:
    if activation != "jump_relu":
        if threshold is not None:
            raise ShapeError(f"threshold: expected None with activation {activation!r}, found a value")
        return None
    if threshold is None:
        raise ShapeError(
            f"threshold: expected a number or shape ({d_sae},) with activation 'jump_relu', found None"
        )
    if np.ndim(threshold) == 0:
        return np.full(d_sae, float(threshold), np.float32)
    return tensors.core_vector(threshold, "threshold", d_sae)

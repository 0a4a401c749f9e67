"""Cosines between dictionaries: of features with the same index, of each feature with its best matches."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from microtome import _core, tensors
from microtome.arguments import flag, required_bytes, whole
from microtome.errors import ShapeError
from microtome.metrics.undefined import warn_undefined

__all__ = ["Matches", "MutualMatches", "decoder_cosine", "match_features", "mutual_matches"]

MEMORY_BUDGET = 1 << 30
"""Bytes that matching may use beyond its inputs, unless told otherwise."""

_ZERO = "the row is zero"


class Matches(NamedTuple):
    """Best matches of every feature, largest cosine first, equal cosines by lower index."""

    indices: npt.NDArray[np.int64]
    """(d_sae, k) features of the other dictionary; -1 where there is none."""
    cosines: npt.NDArray[np.float64]
    """(d_sae, k) their cosines; NaN where there is none."""


class MutualMatches(NamedTuple):
    """Pairs of features that are each other's best match, by ascending ``a``."""

    a: npt.NDArray[np.int64]
    """(m,) features of the first dictionary."""
    b: npt.NDArray[np.int64]
    """(m,) features of the second."""
    cosines: npt.NDArray[np.float64]
    """(m,) cosines of the pairs."""


def decoder_cosine(W_a: Any, W_b: Any) -> npt.NDArray[np.float64]:
    r"""Cosine of every feature's direction in one dictionary with that of the same feature in another.

    .. math:: c_j = \frac{\langle W_{a,j}, W_{b,j} \rangle}{\lVert W_{a,j} \rVert \lVert W_{b,j} \rVert}

    Args:
        W_a: decoder (d_sae, d_in), tensor or array of float32, float16 or bfloat16.
        W_b: decoder of the same shape, feature ``j`` descending from feature ``j`` of ``W_a``.

    Returns:
        (d_sae,) float64, summed in float64. NaN where a row is zero, with an
        :class:`~microtome.errors.UndefinedWarning` that lists it.

    Raises:
        ShapeError: the shapes differ.
        NonFiniteError: NaN or infinity in a decoder.

    Example:
        >>> decoder_cosine(np.eye(2, dtype=np.float32), np.array([[2, 0], [1, 1]], np.float32)).round(4)
        array([1.    , 0.7071])
    """
    a, b = tensors.core_matrix(W_a, "W_a"), tensors.core_matrix(W_b, "W_b")
    cosines = _core.row_cosines(a, b, ("W_a", "W_b"))
    undefined = np.flatnonzero(np.isnan(cosines))
    if len(undefined):
        warn_undefined("decoder_cosine", _ZERO, [f"feature {j}" for j in undefined])
    return cosines


def match_features(
    W_a: Any, W_b: Any, k: int = 1, *, mutual: bool = False, memory_budget: int | str = MEMORY_BUDGET
) -> Matches:
    """The ``k`` best matches, by cosine, of every feature of one dictionary among all features of another.

    Exact: a low-precision screen with a certified error bound leaves out what cannot be a match, and cosines
    of the rest are computed in float64. No (d_sae, d_sae) matrix is made.

    Args:
        W_a: decoder (d_sae_a, d_in), tensor or array of float32, float16 or bfloat16.
        W_b: decoder (d_sae_b, d_in).
        k: matches per feature.
        mutual: keep a match only where it is the best in both directions; needs ``k=1``.
        memory_budget: bytes, or text such as ``"2GiB"``, for packed rows of ``W_b``. The result does not depend on it.

    Returns:
        ``(indices, cosines)``, each (d_sae_a, k). A zero row of ``W_a`` has index -1 and cosine NaN, with an
        :class:`~microtome.errors.UndefinedWarning`; zero rows of ``W_b`` match nothing.

    Raises:
        ShapeError: widths differ, or ``k`` is not between 1 and the number of features of ``W_b``.
        NonFiniteError: NaN or infinity in a decoder.

    Example:
        >>> W = np.eye(3, dtype=np.float32)
        >>> match_features(W, W[[2, 0, 1]]).indices.ravel()
        array([1, 2, 0])
    """
    k, budget = whole(k, "k"), required_bytes(memory_budget)
    if flag(mutual, "mutual") and k != 1:
        raise ShapeError(f"k: expected 1 with mutual=True, found {k}")
    a, b = tensors.core_matrix(W_a, "W_a"), tensors.core_matrix(W_b, "W_b")
    indices, cosines, zero_a, zero_b = _core.match_rows(a, b, k, ("W_a", "W_b"), budget)
    zero = [f"feature {j} of W_a" for j in zero_a] + [f"feature {j} of W_b" for j in zero_b]
    if zero:
        warn_undefined("match_features", _ZERO, zero)
    if mutual:
        back, _, _, _ = _core.match_rows(b, a, 1, ("W_b", "W_a"), budget)
        found = indices[:, 0] >= 0
        one_way = ~found
        one_way[found] = back[indices[found, 0], 0] != np.flatnonzero(found)
        indices[one_way], cosines[one_way] = -1, np.nan
    return Matches(indices, cosines)


def mutual_matches(W_a: Any, W_b: Any, *, memory_budget: int | str = MEMORY_BUDGET) -> MutualMatches:
    """Pairs of features that are each other's best match by cosine.

    Args:
        W_a: decoder (d_sae_a, d_in), tensor or array of float32, float16 or bfloat16.
        W_b: decoder (d_sae_b, d_in).
        memory_budget: as in :func:`match_features`, which also says what is raised.

    Example:
        >>> W = np.eye(3, dtype=np.float32)
        >>> mutual_matches(W, W[:2]).a
        array([0, 1])
    """
    matches = match_features(W_a, W_b, mutual=True, memory_budget=memory_budget)
    a = np.flatnonzero(matches.indices[:, 0] >= 0)
    return MutualMatches(a, matches.indices[a, 0], matches.cosines[a, 0])

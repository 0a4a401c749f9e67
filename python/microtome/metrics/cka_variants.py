"""CKA with other kernels and estimators: RBF, minibatch, and an interval for the debiased linear form."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from microtome import _core, tensors
from microtome.arguments import LARGEST_SEED, MOST_RESAMPLES, flag, required_bytes, whole
from microtome.errors import ShapeError
from microtome.metrics.cka import MEMORY_BUDGET, Float64, named, rows_of
from microtome.metrics.rowtable import column, label_groups
from microtome.metrics.undefined import warn_undefined
from microtome.progress import bar

__all__ = ["CkaInterval", "cka_interval", "minibatch_cka", "rbf_cka"]

_NOT_POSITIVE = "its HSIC with itself is not positive"


class CkaInterval(NamedTuple):
    """Debiased linear CKA, and how far it may be off."""

    estimate: float
    """Debiased CKA of all rows."""
    low: float
    """Lower end of the interval."""
    high: float
    """Upper end of the interval."""
    standard_error: float
    """Standard deviation that the estimate would have over repetitions."""


def minibatch_cka(
    xs: Iterable[Any],
    ys: Iterable[Any] | None = None,
    batch: int = 256,
    *,
    memory_budget: int | str = MEMORY_BUDGET,
    progress: bool = True,
) -> Float64:
    """Minibatch CKA: debiased HSIC averaged over batches, then the ratio.

    Nguyen et al., *Do Wide and Deep Networks Learn the Same Things?*, ICLR 2021. :func:`~microtome.cka_matrix` is
    exact over all rows; this form reproduces numbers that were made with batches.

    Args:
        xs: representations of the same rows, as :func:`~microtome.linear_cka` takes them.
        ys: a second list, or None for all pairs of ``xs``.
        batch: neighbouring rows per batch, at least 4; a last batch of fewer than 4 is left out.
        memory_budget: as in :func:`~microtome.linear_cka`.
        progress: draw a bar on a terminal.

    Returns:
        (len(xs), len(ys)) float64; NaN as in :func:`~microtome.cka_matrix`.

    Raises:
        ShapeError: ``batch`` is below 4, or as :func:`~microtome.cka_matrix`.
        NonFiniteError: NaN or infinity in the input.

    Example:
        >>> x = np.random.default_rng(0).standard_normal((100, 8), dtype=np.float32)
        >>> minibatch_cka([x], [2 * x], batch=20).round(6)
        array([[1.]])
    """
    options = whole(batch, "batch", 4), required_bytes(memory_budget)
    x_layers, y_layers = named(xs, "xs"), None if ys is None else named(ys, "ys")
    tensors.refuse_shifted_rows((*x_layers, *(y_layers or [])))
    with bar("minibatch CKA", rows_of(x_layers), progress) as done:
        values, undefined = _core.minibatch_cka(x_layers, y_layers, *options, done)
    if undefined:
        names = [name for name, _ in (*x_layers, *(y_layers or []))]
        warn_undefined("CKA", _NOT_POSITIVE, [names[i] for i in undefined])
    return values


def rbf_cka(
    x: Any, y: Any, sigma: float = 0.5, debiased: bool = True, *, memory_budget: int | str = MEMORY_BUDGET
) -> float:
    r"""CKA with the kernel :math:`\exp(-\lVert x_i - x_j \rVert^2 / 2\sigma^2)`.

    Kornblith et al., ICML 2019. Needs two n x n matrices of float64.

    Args:
        x: (n, d_x), as :func:`~microtome.linear_cka` takes it.
        y: (n, d_y).
        sigma: width of the kernel, as a fraction of the median distance between rows of ``x``, and of ``y``.
        debiased: as in :func:`~microtome.linear_cka`.
        memory_budget: as in :func:`~microtome.linear_cka`.

    Returns:
        At most 1; NaN, with a warning, when ``x`` or ``y`` is constant.

    Raises:
        ShapeError: ``sigma`` is not positive, or as :func:`~microtome.linear_cka`.
        MemoryError: the matrices exceed the budget.

    Example:
        >>> x = np.random.default_rng(0).standard_normal((50, 8), dtype=np.float32)
        >>> round(rbf_cka(x, 3 * x + 1), 4)
        1.0
    """
    options = flag(debiased, "debiased"), required_bytes(memory_budget)
    pair = ("x", tensors.core_source(x, "x")), ("y", tensors.core_source(y, "y"))
    tensors.refuse_shifted_rows(pair)
    values, undefined = _core.rbf_cka(*pair, sigma, *options)
    if undefined:
        warn_undefined("RBF CKA", _NOT_POSITIVE, [pair[i][0] for i in undefined])
    return float(values[0, 0])


def cka_interval(
    x: Any,
    y: Any,
    *,
    level: float = 0.95,
    n_resamples: int = 200,
    seed: int = 0,
    groups: Any = None,
    memory_budget: int | str = MEMORY_BUDGET,
) -> CkaInterval:
    """Debiased linear CKA with an interval from random halves of the rows.

    A bootstrap repeats rows, and repeated rows look alike: it biases CKA upwards. Halves drawn without repetition do
    not, and scatter around the full estimate as the full estimate scatters around the truth (delete-d jackknife, Shao
    and Wu, 1989).

    Args:
        x: (n, d_x), as :func:`~microtome.linear_cka` takes it; n at least 8.
        y: (n, d_y).
        level: probability that the interval aims to cover.
        n_resamples: halves to draw, 2 to a million.
        seed: of the draws; the same seed gives the same interval.
        groups: (n,) integers, strings or booleans: rows of one group (tokens of one image, say) depend on each other
            and are drawn together. At least 8 groups.
        memory_budget: as in :func:`~microtome.linear_cka`; two n x n matrices of float64 must fit.

    Returns:
        Estimate, low, high, standard error. All but the estimate are NaN, with a warning, where a half is too small
        for its CKA to be defined.

    Raises:
        ShapeError: fewer than 8 rows or groups, fewer than 2 halves, a level outside (0, 1), or as
            :func:`~microtome.linear_cka`.
        DtypeError: groups of another type.
        MemoryError: the matrices exceed the budget.

    Example:
        >>> x = np.random.default_rng(0).standard_normal((100, 8), dtype=np.float32)
        >>> interval = cka_interval(x, x[:, :4])
        >>> interval.low < interval.estimate < interval.high
        True
    """
    if not 0 < level < 1:
        raise ShapeError(f"level: expected a probability between 0 and 1, found {level}")
    draws = whole(n_resamples, "n_resamples", 2, MOST_RESAMPLES), whole(seed, "seed", most=LARGEST_SEED)
    budget = required_bytes(memory_budget)
    pair = ("x", tensors.core_source(x, "x")), ("y", tensors.core_source(y, "y"))
    tensors.refuse_shifted_rows(pair)
    codes = None if groups is None else _numbered(groups)
    estimate, halves, factor = _core.cka_halves(*pair, *draws, codes, budget)
    if np.isnan(halves).any():
        warn_undefined("cka_interval", "a half of the rows has no positive HSIC", ["the interval"])
        return CkaInterval(estimate, math.nan, math.nan, math.nan)
    deviations = (halves - halves.mean()) * factor
    low, high = np.quantile(deviations, [(1 - level) / 2, (1 + level) / 2])
    return CkaInterval(estimate, float(estimate + low), float(estimate + high), float(deviations.std()))


def _numbered(groups: Any) -> npt.NDArray[np.uint32]:
    labels = column("groups", groups)
    if labels.null_count():
        raise ShapeError(f"groups: expected a group in every row, found {labels.null_count()} null")
    return label_groups(labels, "groups").of_rows

r"""Circuits as sets of nodes: their overlap, and the overlap that chance alone would give.

Nodes are numbered ``0 .. n - 1``. Two random circuits of sizes :math:`a` and :math:`b` share a hypergeometric
number :math:`I` of nodes, so the chance level of IoU is a sum over its values, not a simulation:

.. math::
    \mathbb{E}[\mathrm{IoU}] = \sum_i P(I = i) \frac{i}{a + b - i}, \qquad
    \mathrm{nIoU} = \frac{\mathrm{IoU} - \mathbb{E}[\mathrm{IoU}]}{1 - \mathbb{E}[\mathrm{IoU}]}

nIoU: Nikankin et al., *Same Task, Different Circuits*, 2025; the closed form replaces one random draw.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from microtome import _core, tensors
from microtome.arguments import whole
from microtome.errors import DtypeError, ShapeError

__all__ = ["Bitset", "IouChance", "expected_iou", "inclusion_rate", "iou_chance", "normalised_iou", "top_n"]


@dataclass(frozen=True, eq=False, repr=False)
class Bitset:
    """A set of nodes among ``n``, one bit each. Immutable; ``&``, ``|`` and ``-`` make new sets.

    Example:
        >>> a, b = Bitset.from_indices([0, 1, 2], n=100), Bitset.from_indices([1, 2, 3], n=100)
        >>> len(a & b), a.iou(b)
        (2, 0.5)
    """

    words: npt.NDArray[np.uint64]
    """(ceil(n / 64),) words; node ``i`` is bit ``i % 64`` of word ``i // 64``; bits beyond ``n`` are zero."""
    n: int
    """Number of nodes to choose from."""

    def __post_init__(self) -> None:
        whole(self.n, "n")
        expected = (-(-self.n // 64),)
        if self.words.dtype != np.uint64:
            raise DtypeError(f"words: expected uint64, found {self.words.dtype}")
        if self.words.shape != expected:
            raise ShapeError(f"words: expected shape {expected} for {self.n} nodes, found {self.words.shape}")
        if self.n % 64 and int(self.words[-1]) >> (self.n % 64):
            raise ShapeError(f"words: expected no node at or above n = {self.n}, found one")

    @classmethod
    def from_indices(cls, indices: Any, n: int) -> Bitset:
        """The set of ``indices``, in any order; repeated ones count once."""
        nodes = np.asarray(indices)
        if nodes.size == 0:
            nodes = nodes.astype(np.int64)
        if nodes.dtype.kind not in "iu" or nodes.ndim != 1:
            raise ShapeError(f"indices: expected whole numbers (m,), found {nodes.dtype} {nodes.shape}")
        return cls(_core.bitset_from_indices(np.ascontiguousarray(nodes, np.int64), whole(n, "n")), n)

    @classmethod
    def from_mask(cls, mask: Any) -> Bitset:
        """The set of the nodes at which a boolean array is true, numbered in C order whatever its shape."""
        values = np.asarray(mask)
        if values.dtype != np.bool_:
            raise DtypeError(f"mask: expected bool, found {values.dtype}")
        bits = np.packbits(values.reshape(-1), bitorder="little")
        padded = np.zeros(-(-values.size // 64) * 8, np.uint8)
        padded[: bits.size] = bits
        return cls(padded.view("<u8").astype(np.uint64, copy=False), values.size)

    def to_indices(self) -> npt.NDArray[np.int64]:
        """The nodes, ascending."""
        return _core.bitset_to_indices(self.words)

    def to_mask(self) -> npt.NDArray[np.bool_]:
        """(n,) bool."""
        return np.unpackbits(self.words.astype("<u8").view(np.uint8), count=self.n, bitorder="little").view(
            np.bool_
        )

    def __len__(self) -> int:
        return _core.bitset_size(self.words)

    def __contains__(self, node: int) -> bool:
        return 0 <= node < self.n and bool(int(self.words[node // 64]) >> (node % 64) & 1)

    def __and__(self, other: Bitset) -> Bitset:
        return Bitset(self.words & self._like(other).words, self.n)

    def __or__(self, other: Bitset) -> Bitset:
        return Bitset(self.words | self._like(other).words, self.n)

    def __sub__(self, other: Bitset) -> Bitset:
        return Bitset(self.words & ~self._like(other).words, self.n)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Bitset) and self.n == other.n and np.array_equal(self.words, other.words)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"Bitset({len(self)} of {self.n} nodes)"

    def overlap(self, other: Bitset) -> tuple[int, int]:
        """Sizes of intersection and union, in one pass."""
        return _core.bitset_overlap(self.words, self._like(other).words)

    def iou(self, other: Bitset) -> float:
        """Intersection over union; 1 when both sets are empty."""
        intersection, union = self.overlap(other)
        return intersection / union if union else 1.0

    def niou(self, other: Bitset) -> float:
        """IoU on the scale where chance is 0 and equality 1; NaN when chance alone gives 1."""
        return normalised_iou(self.iou(other), expected_iou(self.n, len(self), len(other)))

    def _like(self, other: Bitset) -> Bitset:
        if other.n != self.n:
            raise ShapeError(f"other: expected {self.n} nodes, found {other.n}")
        return other


class IouChance(NamedTuple):
    """IoU of two random circuits of given sizes."""

    mean: float
    """Expected IoU."""
    variance: float
    """Its variance."""
    p_value: float
    """Probability of an intersection at least as large as the one observed; NaN when none was given."""


def expected_iou(n: int | Sequence[int], size_a: int | Sequence[int], size_b: int | Sequence[int]) -> float:
    """Expected IoU of two random circuits, exactly.

    Args:
        n: number of nodes. A sequence gives one number per stratum (layer, type, position), within which
            circuits of the given sizes are drawn independently.
        size_a: nodes of the first circuit, per stratum likewise.
        size_b: nodes of the second.

    Returns:
        The mean over all pairs of circuits; 1 when both are empty.

    Raises:
        ShapeError: a circuit larger than its stratum, or sequences of different length.

    Example:
        >>> round(expected_iou(6, 6, 2), 4)
        0.3333
    """
    return iou_chance(n, size_a, size_b).mean


def iou_chance(
    n: int | Sequence[int],
    size_a: int | Sequence[int],
    size_b: int | Sequence[int],
    intersection: int | None = None,
) -> IouChance:
    """Mean and variance of the IoU of two random circuits, and the p-value of an observed intersection.

    A circuit that drops the position of its nodes is still a uniform draw given its size: pass the number of
    nodes without positions and the sizes that remain, and the chance level is exact for it as well.

    Args:
        n: number of nodes, or one number per stratum.
        size_a: nodes of the first circuit, or per stratum.
        size_b: nodes of the second, or per stratum.
        intersection: size of the intersection observed, over all strata.

    Raises:
        ShapeError: as :func:`expected_iou`.

    Example:
        >>> iou_chance(10, 3, 3, intersection=3).p_value  # one of the 120 circuits of that size
        0.008333333333333333
    """
    sizes = [_numbers(n, "n"), _numbers(size_a, "size_a"), _numbers(size_b, "size_b")]
    if len({len(numbers) for numbers in sizes}) != 1:
        found = [len(numbers) for numbers in sizes[1:]]
        raise ShapeError(
            f"size_a, size_b: expected one size for each of {len(sizes[0])} strata, found {found}"
        )
    observed = None if intersection is None else whole(intersection, "intersection")
    return IouChance(*_core.iou_chance(list(zip(*sizes, strict=True)), observed))


def normalised_iou(iou: float, expected: float) -> float:
    """nIoU: how far ``iou`` lies above chance, as a share of the most it could; never clamped.

    Example:
        >>> normalised_iou(0.75, 0.5)
        0.5
    """
    return (iou - expected) / (1 - expected) if expected < 1 else math.nan


def inclusion_rate(n: int, size: int, positions: int = 1) -> float:
    r"""Share of nodes that a random circuit contains at one of their positions at least.

    .. math:: 1 - \binom{n - P}{a} \Big/ \binom{n}{a}

    With many positions it saturates: a circuit of 7 % of all (node, position) pairs over 26 positions
    contains 85 % of the nodes, and position-free overlap then says little.

    Args:
        n: number of (node, position) pairs.
        size: how many of them the circuit has.
        positions: positions per node.

    Example:
        >>> round(inclusion_rate(26_000, 1_820, positions=26), 2)
        0.85
    """
    named = {"n": n, "size": size, "positions": positions}
    return _core.inclusion_rate(*(whole(value, name) for name, value in named.items()))


def top_n(scores: Any, n: int) -> npt.NDArray[np.int64]:
    """The ``n`` nodes with the largest scores, ascending by node, in one pass over the scores.

    Of equal scores the lower node is taken; NaN counts as minus infinity.

    Args:
        scores: tensor or array of float32, float16 or bfloat16, of any shape; nodes are numbered in C order.
        n: how many.

    Raises:
        ShapeError: there are fewer than ``n`` scores.

    Example:
        >>> top_n(np.array([0.5, 2.0, 0.5, 1.0], np.float32), 3)
        array([0, 1, 3])
    """
    flat = scores.reshape(-1) if hasattr(scores, "reshape") else np.asarray(scores)
    return _core.top_n(tensors.core_vector(flat, "scores"), whole(n, "n"))


def _numbers(value: int | Sequence[int], name: str) -> list[int]:
    """One or several sizes as a list."""
    try:
        sizes = iter(value)  # type: ignore[arg-type]
    except TypeError:
        return [whole(value, name)]
    return [whole(size, name) for size in sizes]

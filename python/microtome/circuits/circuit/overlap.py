"""How much two circuits share: IoU and its excess over chance, by position group (A9, A10).

IoU is |A ∩ B| / |A ∪ B|, of heads and of neurons apart, then averaged: neurons outnumber heads. Chance is the
expected IoU of random sets of the same sizes, exactly, or that of random circuits drawn before positions are
dropped. Then

    nIoU = (IoU - chance) / (1 - chance)

Data positions of two forms do not correspond one by one, so the data group is compared without positions.
With large circuits that is nearly saturated: the tables carry the chance level beside the IoU.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import polars as pl

from microtome.arguments import require_one_of
from microtome.circuits.circuit.nodes import KINDS, Circuit, NodeKind
from microtome.circuits.circuit.positions import PositionMap
from microtome.errors import ShapeError
from microtome.metrics import expected_iou
from microtome.metrics import normalised_iou as above_chance

__all__ = ["Overlap", "circuit_iou", "circuit_niou", "compare_circuits", "normalised_iou", "overlap_rows"]

Kinds = tuple[NodeKind, ...]


class Overlap(NamedTuple):
    """Sizes of two sets of nodes and of what they share."""

    shared: int
    size_a: int
    size_b: int
    n: int
    """Nodes there are."""

    @property
    def iou(self) -> float:
        """Intersection over union; 1 for two empty sets."""
        union = self.size_a + self.size_b - self.shared
        return self.shared / union if union else 1.0

    @property
    def chance(self) -> float:
        """Expected IoU of two random sets of these sizes."""
        return expected_iou(self.n, self.size_a, self.size_b)


def circuit_iou(
    a: Circuit,
    b: Circuit,
    *,
    group: str | None = None,
    kind: NodeKind | None = None,
    position_free: bool | None = None,
    across_models: bool = False,
) -> float:
    """Intersection over union of two circuits.

    Args:
        a: a circuit.
        b: another of the same model. Circuits of two forms (unequal positions) are compared both ways through
            :class:`PositionMap` and averaged.
        group: only the nodes of one position group.
        kind: ``"heads"`` or ``"neurons"``; the average of both when None, without a kind that both circuits
            lack.
        position_free: drop position labels; True for the data group when None.
        across_models: compare circuits whose facts name different weights, such as before and after pruning.

    Raises:
        ShapeError: different models or weights, or circuits that do not know the group.

    Example:
        >>> import numpy as np
        >>> heads, neurons = np.zeros((2, 1, 2, 4), bool), np.zeros((2, 1, 2, 4), bool)
        >>> heads[0, 0, 0, :3] = heads[1, 0, 0, 1:] = True
        >>> circuit_iou(Circuit.of_masks(heads[0], neurons[0]), Circuit.of_masks(heads[1], neurons[1]))
        0.5
    """
    _require_one_model(a, b, across_models)
    return _mean(_overlaps(a, b, group, kind, position_free), "iou")


def circuit_niou(
    a: Circuit,
    b: Circuit,
    *,
    group: str | None = None,
    kind: NodeKind | None = None,
    position_free: bool | None = None,
    chance: Literal["exact", "draws"] = "exact",
    compat: Literal["notebook"] | None = None,
    n_draws: int = 100,
    seed: int = 0,
    across_models: bool = False,
) -> float:
    """IoU beyond chance: 0 for random circuits, 1 for equal ones; NaN where chance itself is 1.

    Args:
        a: a circuit.
        b: another of the same model.
        group: as in :func:`circuit_iou`.
        kind: as in :func:`circuit_iou`.
        position_free: as in :func:`circuit_iou`.
        chance: ``"exact"`` for random sets of the compared sizes; ``"draws"`` for random circuits of the same
            sizes that go through the same dropping of positions.
        compat: ``"notebook"`` gives what the paper's notebook computes, IoU - 2 · chance clamped to 0.01 to
            1.
        n_draws: random circuits.
        seed: of the draws.
        across_models: as in :func:`circuit_iou`.

    Raises:
        ShapeError: as :func:`circuit_iou`.

    Example:
        >>> import numpy as np
        >>> heads, neurons = np.zeros((2, 1, 2, 4), bool), np.zeros((2, 1, 2, 4), bool)
        >>> heads[0, 0, 0, :3] = heads[1, 0, 0, 1:] = True
        >>> a, b = (Circuit.of_masks(h, n) for h, n in zip(heads, neurons))
        >>> round(circuit_niou(a, b), 3)              # 3 of 8 twice: 0.259 by chance, 0.5 seen
        0.325
    """
    _require_one_model(a, b, across_models)
    require_one_of("chance", chance, ("exact", "draws"))
    if n_draws < 1:
        raise ShapeError(f"n_draws: expected 1 or more, found {n_draws}")
    overlaps = _overlaps(a, b, group, kind, position_free)
    level = _mean(overlaps, "chance")
    if chance == "draws":
        level = float(random_ious(a, b, group, kind, position_free, n_draws, seed).mean())
    return normalised_iou(_mean(overlaps, "iou"), level, compat)


def normalised_iou(iou: float, chance: float, compat: Literal["notebook"] | None = None) -> float:
    """(IoU - chance) / (1 - chance); NaN where chance is 1. ``compat`` as in :func:`circuit_niou`."""
    require_one_of("compat", compat, (None, "notebook"))
    if compat == "notebook":
        return min(max(iou - 2 * chance, 0.01), 1.0)
    return above_chance(iou, chance)


def _require_one_model(a: Circuit, b: Circuit, across_models: bool) -> None:
    if not across_models:
        a.require_same_model(b)


def _mean(overlaps: list[list[Overlap]], name: str) -> float:
    """Mean over kinds, in each of the directions compared, then over directions."""
    means = []
    for kinds in overlaps:
        present = [o for o in kinds if o.size_a or o.size_b] or kinds
        means.append(float(np.mean([getattr(o, name) for o in present])))
    return float(np.mean(means))


def _overlaps(
    a: Circuit, b: Circuit, group: str | None, kind: NodeKind | None, position_free: bool | None
) -> list[list[Overlap]]:
    """Overlaps of the wanted kinds; one list, or two where the circuits compare both ways."""
    kinds: Kinds = KINDS if kind is None else (kind,)
    return [[_overlap(x, y, k, n) for k in kinds] for x, y, n in _aligned(a, b, group, position_free)]


def _overlap(a: Circuit, b: Circuit, kind: NodeKind, n_slots: int) -> Overlap:
    layers, _, width = a.shape.of(kind)
    shared, _ = a.bits(kind).overlap(b.bits(kind))
    return Overlap(shared, a.size(kind), b.size(kind), layers * n_slots * width)


def _aligned(
    a: Circuit, b: Circuit, group: str | None, position_free: bool | None
) -> Iterator[tuple[Circuit, Circuit, int]]:
    """The circuits to compare with the number of positions they may use."""
    if (a.shape.n_layers, a.shape.n_heads, a.shape.d_mlp) != (
        b.shape.n_layers,
        b.shape.n_heads,
        b.shape.d_mlp,
    ):
        raise ShapeError(f"circuits: expected one model, found {tuple(a.shape)} and {tuple(b.shape)}")
    if group == "data" if position_free is None else position_free:
        yield a.without_positions(group), b.without_positions(group), 1
        return
    same = a.shape == b.shape and dict(a.groups) == dict(b.groups)
    if not same and a.shape != b.shape and not (a.groups and b.groups):
        raise ShapeError(
            f"circuits: expected equal positions or position groups, found {a.shape.n_slots} and {b.shape.n_slots} "
            "positions without groups"
        )
    if same or not (a.groups and b.groups):
        both = (a, b) if group is None else (a.group(group), b.group(group))
        yield *both, a.shape.n_slots if group is None else len(a.positions(group))
        return
    there = PositionMap.between(a.groups, b.groups, a.shape.n_slots, b.shape.n_slots)
    for x, y, mapping in ((a, b, there), (b, a, there.inverse())):
        inner, outer = (x, y) if group is None else (x.group(group), y.group(group))
        yield mapping.apply(inner), outer, y.shape.n_slots if group is None else len(y.positions(group))


def random_ious(
    a: Circuit,
    b: Circuit,
    group: str | None,
    kind: NodeKind | None,
    position_free: bool | None,
    n_draws: int,
    seed: int,
) -> npt.NDArray[np.float64]:
    """IoU of ``n_draws`` pairs of random circuits with the sizes of ``a`` and ``b`` in every group."""
    drawn = _random_pairs(a, b, n_draws, seed)
    return np.array([_mean(_overlaps(x, y, group, kind, position_free), "iou") for x, y in drawn])


def _random_pairs(a: Circuit, b: Circuit, n_draws: int, seed: int) -> Iterator[tuple[Circuit, Circuit]]:
    rng = np.random.default_rng(seed)
    for _ in range(n_draws):
        yield a.shuffled(int(rng.integers(2**63))), b.shuffled(int(rng.integers(2**63)))


def _parts(a: Circuit, b: Circuit) -> list[tuple[str | None, NodeKind | None]]:
    """Groups that both circuits have, and everything; heads, neurons and their mean in each."""
    groups = [None, *(g for g in a.groups if a.groups[g] and b.groups.get(g))]
    return [(group, kind) for group in groups for kind in (*KINDS, None)]


def overlap_rows(a: Circuit, b: Circuit) -> Iterator[dict[str, Any]]:
    """Overlap by position group (and ``all``) and kind: group, kind, size_a, size_b, iou, chance, niou."""
    for group, kind in _parts(a, b):
        overlaps = _overlaps(a, b, group, kind, None)
        iou, chance = _mean(overlaps, "iou"), _mean(overlaps, "chance")
        yield {
            "group": group or "all",
            "kind": kind or "mean",
            "size_a": sum(o.size_a for o in overlaps[0]),
            "size_b": sum(o.size_b for o in overlaps[0]),
            "iou": iou,
            "chance": chance,
            "niou": normalised_iou(iou, chance),
        }


def compare_circuits(
    a: Circuit, b: Circuit, *, n_draws: int = 100, seed: int = 0, across_models: bool = False
) -> pl.DataFrame:
    """Overlap of two circuits in every position group and overall.

    Args:
        a: a circuit.
        b: another of the same model.
        n_draws: random circuits of the same sizes in every group.
        seed: of the draws.
        across_models: as in :func:`circuit_iou`.

    Returns:
        One row per group (and ``all``) and kind (``heads``, ``neurons``, ``mean``): size_a, size_b (of the
        compared sets: without positions in the data group), iou, chance (expected IoU of random sets of these
        sizes), niou, and from ``n_draws`` random circuits, drawn before positions are dropped, drawn_mean,
        drawn_low, drawn_high (95 %), niou_drawn and p, the share of draws that reach the IoU.

    Raises:
        ShapeError: as :func:`circuit_iou`.
    """
    _require_one_model(a, b, across_models)
    if n_draws < 1:
        raise ShapeError(f"n_draws: expected 1 or more, found {n_draws}")
    parts = _parts(a, b)
    drawn = np.array(
        [
            [_mean(_overlaps(x, y, *part, None), "iou") for part in parts]
            for x, y in _random_pairs(a, b, n_draws, seed)
        ]
    )
    rows = []
    for row, ious in zip(overlap_rows(a, b), drawn.T, strict=True):
        low, high = np.quantile(ious, [0.025, 0.975])
        more = {
            "drawn_mean": float(ious.mean()),
            "drawn_low": float(low),
            "drawn_high": float(high),
            "niou_drawn": normalised_iou(row["iou"], float(ious.mean())),
            "p": (1 + int((ious >= row["iou"]).sum())) / (n_draws + 1),
        }
        rows.append(row | more)
    return pl.DataFrame(rows)

"""Which positions of one prompt form correspond to which of another: many to many, group by group (A9)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from microtome.circuits.circuit.nodes import KINDS, Circuit
from microtome.errors import ShapeError

__all__ = ["PositionMap"]

Groups = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, eq=False)
class PositionMap:
    """Correspondence between the positions of two forms of one task.

    Example:
        >>> text = {"data": (0, 1, 2), "query": (3, 4), "generation": (5,)}
        >>> image = {"data": (0, 1), "query": (2, 3), "generation": (4,)}
        >>> PositionMap.between(text, image).pairs[:, 0].astype(int).tolist()     # all words of the data go to each image token
        [1, 1, 1, 0, 0, 0]
    """

    pairs: npt.NDArray[np.bool_]
    """Shape ``(P_a, P_b)``: whether position a corresponds to position b."""
    groups_a: Groups
    groups_b: Groups

    @classmethod
    def between(
        cls, groups_a: Groups, groups_b: Groups, n_a: int | None = None, n_b: int | None = None
    ) -> PositionMap:
        """Data: every position with every one. Other groups in order; unequal lengths in proportion, none left out.

        Args:
            groups_a: positions of each group on one side, as circuits and pairs carry them.
            groups_b: the same of the other side.
            n_a: positions of the one side; one more than the largest in its groups when None.
            n_b: positions of the other side.

        Raises:
            ShapeError: the two sides have no group in common.
        """
        shared = [group for group in groups_a if group in groups_b]
        if not shared:
            raise ShapeError(
                f"position map: expected common groups, found {list(groups_a)} and {list(groups_b)}"
            )
        sizes = [
            n or 1 + max(max(p, default=-1) for p in g.values())
            for g, n in ((groups_a, n_a), (groups_b, n_b))
        ]
        pairs = np.zeros(sizes, bool)
        for group in shared:
            a, b = np.asarray(groups_a[group], np.int64), np.asarray(groups_b[group], np.int64)
            if not len(a) or not len(b):
                continue
            if group == "data":
                pairs[np.ix_(a, b)] = True
            else:
                n = max(len(a), len(b))
                pairs[a[np.arange(n) * len(a) // n], b[np.arange(n) * len(b) // n]] = True
        return cls(pairs, groups_a, groups_b)

    def inverse(self) -> PositionMap:
        """The other way round."""
        return PositionMap(self.pairs.T, self.groups_b, self.groups_a)

    def apply(self, circuit: Circuit) -> Circuit:
        """``circuit`` at the corresponding positions of the other side.

        Raises:
            ShapeError: the circuit has another number of positions.
        """
        if circuit.shape.n_slots != len(self.pairs):
            raise ShapeError(
                f"position map: expected a circuit of {len(self.pairs)} positions, found {circuit.shape.n_slots}"
            )
        masks = []
        for kind in KINDS:
            mask = circuit.mask(kind)
            masks.append(np.stack([mask[:, column].any(1) for column in self.pairs.T], 1))
        return Circuit.of_masks(masks[0], masks[1], self.groups_b)

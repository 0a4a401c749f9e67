"""Which heads and features are taken out, and the controls drawn beside them: as many, of the same layers, as frequent."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from microtome.circuits.ablation.interventions import Heads
from microtome.circuits.circuit.scores import NodeScores
from microtome.errors import ShapeError

__all__ = ["attributed_heads", "matched_features", "random_heads"]


def attributed_heads(scores: NodeScores, n: int) -> list[tuple[int, int]]:
    """The ``n`` heads with the largest magnitude summed over positions, the largest first; ties to the lower layer and head.

    Raises:
        ShapeError: fewer than ``n`` heads, or ``n`` below 1.

    Example:
        >>> heads = np.zeros((2, 3, 4), np.float32)
        >>> heads[1, 0, 2] = heads[0, :, 3] = 1
        >>> attributed_heads(NodeScores(heads, np.zeros((2, 3, 8), np.float32), 1), 2)
        [(0, 3), (1, 2)]
    """
    totals = np.abs(np.nan_to_num(scores.heads.astype(np.float64))).sum(1)  # (L, H)
    if not 1 <= n <= totals.size:
        raise ShapeError(f"n: expected 1 to {totals.size} heads, found {n}")
    order = np.argsort(-totals, axis=None, kind="stable")[:n]
    return [(int(i // totals.shape[1]), int(i % totals.shape[1])) for i in order]


def random_heads(model: Any, heads: Heads, n: int, seed: int = 0) -> list[list[tuple[int, int]]]:
    """``n`` control sets: as many other heads of the same layers; of any layer where a layer has too few.

    Raises:
        ShapeError: the model has too few other heads.
    """
    from microtome.capture.models import adapt

    adapter = adapt(model)
    chosen = set(heads)
    rng = np.random.default_rng(seed)
    others = [
        (la, h) for la in range(adapter.n_layers) for h in range(adapter.n_heads) if (la, h) not in chosen
    ]
    if len(others) < len(chosen):
        raise ShapeError(f"heads: expected at most half of the model's heads, found {len(chosen)}")
    out = []
    for _ in range(n):
        free = [others[i] for i in rng.permutation(len(others))]
        drawn = []
        for layer, _head in heads:
            pick = next((x for x in free if x[0] == layer), free[0])
            free.remove(pick)
            drawn.append(pick)
        out.append(drawn)
    return out


def matched_features(
    frequency: npt.ArrayLike, features: Sequence[int], n: int, seed: int = 0, *, pool: int = 50
) -> list[list[int]]:
    """``n`` control sets of features that fire about as often as the chosen ones.

    Args:
        frequency: firing frequency of every feature of the layer, ``(d_sae,)``.
        features: the chosen ones.
        n: sets.
        seed: of the draws.
        pool: each control is drawn from the ``pool`` other live features nearest in log frequency.

    Raises:
        ShapeError: an index outside the dictionary, or too few other live features.
    """
    f = np.asarray(frequency, np.float64)
    if f.ndim != 1 or any(not 0 <= i < len(f) for i in features):
        raise ShapeError(f"features: expected indices below {f.size}, found {list(features)}")
    live = np.flatnonzero((f > 0) & ~np.isin(np.arange(len(f)), list(features)))
    if len(live) < len(features):
        raise ShapeError(
            f"features: expected at least {len(features)} other live features, found {len(live)}"
        )
    rng = np.random.default_rng(seed)
    logs = np.log(np.maximum(f, 1e-12))
    out = []
    for _ in range(n):
        free = live
        drawn: list[int] = []
        for feature in features:
            near = free[np.argsort(np.abs(logs[free] - logs[feature]), kind="stable")[:pool]]
            drawn.append(int(rng.choice(near)))
            free = free[free != drawn[-1]]
        out.append(drawn)
    return out

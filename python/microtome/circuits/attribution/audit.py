"""How far scores and circuits can be trusted: agreement with exact patching, completeness, exact maps."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import polars as pl
import torch

from microtome.circuits.attribution.nodes import attribute
from microtome.circuits.circuit.nodes import KINDS, NAMES, Circuit, CircuitShape
from microtome.circuits.faithfulness.nodes import faithfulness_of
from microtome.circuits.forward.decoder import (
    as_pair_set,
    last_logits,
    left_as_found,
    logit_difference,
    merge_pair,
)
from microtome.circuits.pairs.pair_set import PairSet
from microtome.circuits.attribution.passes import interpolated
from microtome.circuits.circuit.scores import NodeScores
from microtome.errors import ShapeError

__all__ = [
    "Completeness",
    "completeness",
    "exact_agreement",
    "patching_map",
    "rank_correlation",
]


def rank_correlation(x: npt.ArrayLike, y: npt.ArrayLike) -> float:
    """Spearman's ρ, ties at their mean rank; NaN for fewer than two values or a constant.

    Raises:
        ShapeError: the vectors differ in length.

    Example:
        >>> round(rank_correlation([1, 2, 3, 4], [1, 3, 2, 4]), 6)
        0.8
    """
    a, b = np.asarray(x, np.float64), np.asarray(y, np.float64)
    if a.shape != b.shape or a.ndim != 1:
        raise ShapeError(
            f"rank_correlation: expected two vectors of one length, found {a.shape} and {b.shape}"
        )
    ranks = [pl.Series(v).rank("average").to_numpy() for v in (a, b)]
    if len(a) < 2 or any(np.ptp(r) == 0 for r in ranks):
        return float("nan")
    return float(np.corrcoef(ranks[0], ranks[1])[0, 1])


def exact_agreement(
    model: Any,
    pairs: PairSet,
    scores: NodeScores,
    n_nodes: int = 200,
    *,
    batch_size: int = 8,
    progress: bool = True,
) -> pl.DataFrame:
    """Attribution against exact patching on the ``n_nodes`` heads and as many neurons that score highest.

    Returns:
        One row per node, the highest score first: kind, layer, position, index, score, exact. Feed the columns to
        :func:`rank_correlation`.
    """
    top = scores.to_polars(n_nodes)
    masks = []
    for kind, name in NAMES.items():
        mask = np.zeros(scores.shape.of(kind), np.bool_)
        rows = top.filter(pl.col("kind") == name).select("layer", "position", "index").to_numpy()
        mask[tuple(rows.T)] = True
        masks.append(mask)
    exact = attribute(
        model,
        pairs,
        "exact",
        nodes=Circuit.of_masks(masks[0], masks[1]),
        signed=scores.signed,
        batch_size=batch_size,
        progress=progress,
    )
    values = [
        (exact.heads if kind == "head" else exact.neurons)[layer, position, index]
        for kind, layer, position, index in top.select("kind", "layer", "position", "index").iter_rows()
    ]
    return top.with_columns(pl.Series("exact", values, pl.Float32))


class Completeness(NamedTuple):
    """Whether the path integral adds up to what it must."""

    integral: float
    """Mean of Σ (e - e') · mean gradient along the path."""
    difference: float
    """Mean of LD(e) - LD(e')."""

    @property
    def error(self) -> float:
        """Relative error of the integral."""
        return abs(self.integral - self.difference) / max(abs(self.difference), 1e-9)


def completeness(model: Any, pairs: PairSet, steps: int = 50, *, batch_size: int = 4) -> Completeness:
    """Completeness of integrated gradients over the merged embeddings, at midpoints (i - 1/2) / ``steps``.

    The sum over embeddings and DeepStack features of (e - e') times the mean gradient tends to LD(e) - LD(e')
    as steps grow.
    """
    from microtome.capture.models import adapt

    pairs = as_pair_set(pairs)
    adapter = adapt(model)
    points = (0.0, *((i + 0.5) / steps for i in range(steps)), 1.0)
    totals = np.zeros(2)
    with left_as_found(model), torch.inference_mode(False):
        for batch in pairs.batches(batch_size, model.device):
            clean, corrupted = merge_pair(adapter, batch)
            path = interpolated(
                adapter, clean, corrupted, batch.partner, points, "merged", batch.clean["input_ids"]
            )
            leaves = [x.detach().requires_grad_() for x in (path.embeds, *path.deepstack)]
            n = len(points)
            with torch.enable_grad():
                logits = last_logits(adapter, path.at(leaves[0], leaves[1:]))
                values = logit_difference(logits, batch.answers.repeat(n), batch.corrupted_answers.repeat(n))
            grads = torch.autograd.grad(values.sum(), leaves)
            for leaf, grad in zip(leaves, grads, strict=True):
                stages, slopes = leaf.detach().unflatten(0, (n, -1)), grad.unflatten(0, (n, -1))
                totals[0] += float(((stages[-1] - stages[0]) * slopes[1:-1].mean(0)).double().sum())
            ends = values.detach().unflatten(0, (n, -1))
            totals[1] += float((ends[-1] - ends[0]).double().sum())
    integral, difference = totals / len(pairs)
    return Completeness(float(integral), float(difference))


def patching_map(
    model: Any, pairs: PairSet, *, batch_size: int = 16, progress: bool = True
) -> npt.NDArray[np.float64]:
    """Measured patching effects over layer and position (A12): mean |LD with all nodes there patched - LD|. Shape ``(L, P)``.

    One forward per layer and position; :meth:`NodeScores.effect_map` is its approximation.
    """
    from microtome.capture.models import adapt

    adapter = adapt(model)
    shape = CircuitShape(adapter.n_layers, pairs.n_slots, adapter.n_heads, adapter.d_mlp)
    circuits = []
    for layer in range(shape.n_layers):
        for slot in range(shape.n_slots):
            masks = [np.ones(shape.of(kind), bool) for kind in KINDS]
            for mask in masks:
                mask[layer, slot] = False
            circuits.append(Circuit.of_masks(masks[0], masks[1]))
    found = faithfulness_of(model, pairs, circuits, batch_size=batch_size, progress=progress)
    effects = [float(np.abs(one.circuit - one.full).mean()) for one in found]
    return np.array(effects).reshape(shape.n_layers, shape.n_slots)

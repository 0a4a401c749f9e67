"""How far scores and circuits can be trusted: agreement with exact patching, completeness, exact maps."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import polars as pl
import torch

from microtome.circuits.attribution.nodes import attribute
from microtome.circuits.attribution.path import interpolated
from microtome.circuits.circuit.nodes import NAMES, Circuit
from microtome.circuits.circuit.scores import NodeScores
from microtome.circuits.forward.decoder import last_logits, logit_difference
from microtome.circuits.forward.restore import left_as_found
from microtome.circuits.pairs.pair_set import PairSet, as_pair_set, check_first, merge_pair
from microtome.errors import ShapeError

__all__ = [
    "Completeness",
    "completeness",
    "exact_agreement",
]


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

    Raises:
        ShapeError: ``steps`` is below 1.
    """
    from microtome.capture.models import adapt

    pairs = as_pair_set(pairs)
    if steps < 1:
        raise ShapeError(f"steps: expected 1 or more, found {steps}")
    adapter = adapt(model)
    points = (0.0, *((i + 0.5) / steps for i in range(steps)), 1.0)
    totals = np.zeros(2)
    with left_as_found(model), torch.inference_mode(False):
        check_first(adapter, pairs)
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

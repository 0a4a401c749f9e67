"""Faithfulness of edge circuits: the clean prompt runs with every edge outside the circuit cut (A7, A15; as EAP-IG and MIB do).

Per pair F = [LD_c - LD_∅] / [LD_M - LD_∅], where ∅, with every edge cut, is the counterfactual run, and M is the
clean one. :mod:`microtome.circuits.faithfulness.cut` says what a cut edge is.

Keeping all edges that leave ``input`` and a set of nodes is the node ablation of all other nodes at all
positions: both measures agree there.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch

from microtome.circuits.circuit.edges import EdgeGraph
from microtome.circuits.circuit.scores import MIB_SIZES
from microtome.circuits.faithfulness.cut import EdgesCut
from microtome.circuits.faithfulness.results import Curve, Faithfulness
from microtome.circuits.forward.attention import watched_attention
from microtome.circuits.forward.restore import left_as_found
from microtome.circuits.forward.wiring import check_wiring
from microtome.circuits.pairs.pair_set import PairSet, as_pair_set, check_first
from microtome.errors import ShapeError
from microtome.progress import bar

__all__ = ["edge_faithfulness", "edge_faithfulness_curve", "edge_faithfulness_of"]


def edge_faithfulness(
    model: Any,
    pairs: PairSet,
    graph: EdgeGraph,
    *,
    average: Literal["ratios", "means"] = "ratios",
    batch_size: int = 8,
    progress: bool = True,
) -> Faithfulness:
    """How much of the logit difference the selected edges of ``graph`` alone keep.

    Args:
        model: a transformers model whose MLP follows its attention; left as it was found.
        pairs: prepared pairs of equal length.
        graph: the circuit, as :meth:`EdgeGraph.top`, :meth:`EdgeGraph.greedy` or :meth:`EdgeGraph.from_json` give it.
        average: ``"ratios"`` for the mean of per-pair ratios, ``"means"`` for the ratio of means, as MIB does.
        batch_size: pairs per forward.
        progress: show a bar.

    Raises:
        ShapeError: the graph has other layers or heads than the model, pairs do not align, or layers do not add
            their attention and then their MLP to the residual stream.
        Error: the model changes hidden states between its decoder and its head.

    Example:
        >>> from microtome import organism
        >>> from microtome.circuits import attribute_edges, prepare
        >>> model, processor = organism.load_model(), organism.load_processor()
        >>> pairs = prepare(model, processor, organism.pairs("colour", "textual", 2))
        >>> graph = attribute_edges(model, pairs, steps=2)
        >>> round(float(edge_faithfulness(model, pairs, graph.top(graph.n_edges))), 3)
        1.0
    """
    return edge_faithfulness_of(
        model, pairs, [graph], average=average, batch_size=batch_size, progress=progress
    )[0]


def edge_faithfulness_of(
    model: Any,
    pairs: PairSet,
    graphs: Sequence[EdgeGraph],
    *,
    average: Literal["ratios", "means"] = "ratios",
    batch_size: int = 8,
    progress: bool = True,
) -> list[Faithfulness]:
    """:func:`edge_faithfulness` of many circuits, which share the clean and the counterfactual run."""
    from microtome.capture.models import adapt

    pairs = as_pair_set(pairs)
    if average not in ("ratios", "means"):
        raise ShapeError(f"average: expected ratios or means, found {average!r}")
    if not all(pair.is_aligned for pair in pairs):
        raise ShapeError("pairs: expected counterfactuals of equal length, found unequal ones")
    adapter = adapt(model)
    for i, graph in enumerate(graphs):
        if (graph.n_layers, graph.n_heads) != (adapter.n_layers, adapter.n_heads):
            raise ShapeError(
                f"graph {i}: expected {adapter.n_layers} layers and {adapter.n_heads} heads of the model, found "
                f"{graph.n_layers} and {graph.n_heads}"
            )
    differences = np.full((len(graphs) + 2, len(pairs)), np.nan)
    with (
        left_as_found(model),
        torch.no_grad(),
        watched_attention(model) as watch,
        bar("edge faithfulness", len(pairs), progress, "pairs") as done,
    ):
        check_wiring(adapter, check_first(adapter, pairs), watch)
        for batch in pairs.batches(batch_size, model.device, done):
            cut = EdgesCut.of(adapter, batch, watch)
            rows = [cut.difference(cut.logits(graph)) for graph in graphs]
            rows += [cut.difference(cut.empty), cut.difference(cut.full)]
            differences[:, list(batch.indices)] = rows
    *kept, empty, full = differences
    return [
        Faithfulness(row, empty, full, average, "counterfactual edges", int(graph.selected.sum()))
        for row, graph in zip(kept, graphs, strict=True)
    ]


def edge_faithfulness_curve(
    model: Any,
    pairs: PairSet,
    graph: EdgeGraph,
    sizes: Sequence[float] = MIB_SIZES,
    *,
    select: Literal["top", "greedy"] = "top",
    by: Literal["absolute", "signed"] = "absolute",
    prune: bool = True,
    average: Literal["ratios", "means"] = "means",
    batch_size: int = 8,
    progress: bool = True,
) -> Curve:
    """Faithfulness of the circuits of ``int(size · n_edges)`` edges selected from the scores of ``graph``.

    Args:
        model: a transformers model; left as it was found.
        pairs: prepared pairs of equal length.
        graph: scores of all edges, from :func:`attribute_edges`.
        sizes: rising shares of the edges, by default the ten of MIB.
        select: ``"top"`` takes the best edges, ``"greedy"`` the best that lead to what is reached from the logits.
        by: rank scores by magnitude or by value.
        prune: leave out edges that do not connect input and logits.
        average: see :func:`edge_faithfulness`.
        batch_size: pairs per forward.
        progress: show a bar.

    Raises:
        ShapeError: sizes that are not rising shares from 0 to 1, or an option that is not one of those there are.
    """
    if not len(sizes) or any(b <= a for a, b in itertools.pairwise(sizes)):
        raise ShapeError(f"sizes: expected rising shares, found {list(sizes)}")
    if sizes[0] < 0 or sizes[-1] > 1:
        raise ShapeError(f"sizes: expected shares from 0 to 1, found {list(sizes)}")
    if select not in ("top", "greedy"):
        raise ShapeError(f"select: expected top or greedy, found {select!r}")
    choose = graph.top if select == "top" else graph.greedy
    chosen = [choose(int(size * graph.n_edges), by=by, prune=prune) for size in sizes]
    points = edge_faithfulness_of(
        model, pairs, chosen, average=average, batch_size=batch_size, progress=progress
    )
    return Curve(np.asarray(sizes, np.float64), tuple(points))

"""Node attribution: which heads and neurons, at which positions, carry the difference between two prompts.

For every node u with activation a_u, clean prompt p and counterfactual p' (same-task-different-circuits, A3
to A5):

1. Δ_u = a_u(p') - a_u(p), from one forward each.
2. g_u = mean over points of ∂LD/∂a_u, where LD = logit[r] - logit[r'] at the last position.
   ``plain``: at p. ``ig``: at embeddings e' + (i/k)(e - e'), i = 1..k, image features and DeepStack features
   included.
   ``clean_corrupted``: at p and p'. ``ig_activations``: at a_u(p') + (i/k)(a_u(p) - a_u(p')) of the node's
   own layer.
3. Score = |Σ Δ_u ⊙ g_u| per pair, summed over the head's dimensions first; mean over pairs.

``exact`` replaces 2 and 3 by the measured LD(p with a_u := a_u(p')) - LD(p).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch

from microtome.arguments import parse_bytes
from microtome.circuits.attribution.exact import exact_scores
from microtome.circuits.attribution.passes import Accumulator, add_batch
from microtome.circuits.attribution.plan import Plan, plan_run
from microtome.circuits.attribution.settings import Method, Settings
from microtome.circuits.attribution.streaming import Stream
from microtome.circuits.circuit.nodes import Circuit
from microtome.circuits.circuit.scores import NodeScores
from microtome.circuits.forward.restore import left_as_found
from microtome.circuits.pairs.pair_set import PairSet, as_pair_set, check_first
from microtome.errors import ShapeError
from microtome.progress import bar

__all__ = ["attribute"]


def attribute(
    model: Any,
    pairs: PairSet,
    method: Method = "ig",
    steps: int = 5,
    *,
    ig_path: Literal["merged", "text_only"] = "merged",
    head_reduce: Literal["abs_sum", "sum_abs"] = "abs_sum",
    signed: bool = False,
    nodes: Circuit | None = None,
    batch_size: int = 8,
    memory_budget: int | str | None = None,
    out: str | Path | None = None,
    progress: bool = True,
) -> NodeScores:
    """Score every attention head and MLP neuron at every position.

    Args:
        model: a transformers model; left as it was found.
        pairs: prepared pairs, see :func:`microtome.circuits.prepare`.
        method: see the module's text. ``"exact"`` costs a forward per node: give ``nodes``.
        steps: points k of the two integrated methods.
        ig_path: ``"text_only"`` leaves image features clean on the path, as the paper's reference code does.
        head_reduce: ``"abs_sum"`` is |Σ over d_head|, the first-order effect of the head; ``"sum_abs"`` takes
            the absolute value of every dimension first, as the reference code does.
        signed: keep signs instead of absolute values; opposite effects on different pairs then cancel. Not with
            ``"sum_abs"``.
        nodes: for ``"exact"``, the nodes to measure; the others are NaN. All when None.
        batch_size: pairs per forward; the points of a pair are batched besides.
        memory_budget: bytes, or text such as ``"2GiB"``, for what a run holds beside the model and the
            scores it returns: graph, activations and sums in progress. A smaller budget means smaller batches,
            layers run again, and several passes over layers and positions. With ``out`` scores are on disk too.
            Not with ``"exact"``, of which ``batch_size`` alone says what it holds.
        out: folder of a resumable run: finished parts are skipped, scores are mapped from disk. ``"exact"`` has one part.
        progress: show a bar.

    Raises:
        ShapeError: an argument is out of range, or the budget holds not even one layer at one position.
        NonFiniteError: a gradient is NaN or infinite although its logit difference is not.

    Example:
        >>> from microtome import organism
        >>> from microtome.circuits import prepare
        >>> model, processor = organism.load_model(), organism.load_processor()
        >>> pairs = prepare(model, processor, organism.pairs("colour", "textual", 4))
        >>> scores = attribute(model, pairs)
        >>> scores.heads.shape == (scores.shape.n_layers, pairs.n_slots, scores.shape.n_heads)
        True
    """
    from microtome.capture.models import adapt

    pairs = as_pair_set(pairs)
    settings = Settings(method, steps, ig_path, head_reduce, signed)
    settings.check()
    if batch_size < 1:
        raise ShapeError(f"batch_size: expected 1 or more, found {batch_size}")
    budget = parse_bytes(memory_budget)
    if budget is not None and method == "exact":
        raise ShapeError(f"memory_budget: expected none with method='exact', found {memory_budget!r}")
    if nodes is not None and method != "exact":
        raise ShapeError(
            f"nodes: expected method='exact', found {method!r}. Only exact patching takes a subset"
        )
    adapter = adapt(model)
    with left_as_found(model):
        check_first(adapter, pairs)
        if method == "exact":
            return exact_scores(adapter, pairs, nodes, settings, batch_size, out, progress)
        plan = plan_run(adapter, pairs, settings, batch_size, budget)
        with torch.inference_mode(False):
            return _run(adapter, pairs, settings, plan, out, progress)


def _run(
    adapter: Any, pairs: PairSet, settings: Settings, plan: Plan, out: str | Path | None, progress: bool
) -> NodeScores:
    stream = Stream(adapter, pairs, settings, plan, out)
    with bar("attribution", len(plan.tiles) * len(pairs), progress, "pairs") as done:
        for number, tile in enumerate(plan.tiles):
            if stream.is_finished(number):
                continue
            total: Accumulator = stream.begin(tile)
            for place, batch in enumerate(pairs.batches(plan.batch_size, adapter.model.device)):
                if place < total.batches_done:
                    continue
                add_batch(adapter, batch, settings, plan, tile, total)
                stream.checkpoint(number, total)
                done(number * len(pairs) + total.n_seen)
            stream.finish(number, tile, total)
    return stream.scores()

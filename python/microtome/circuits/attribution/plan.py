"""How an attribution run fits a memory budget, and what it will cost.

A run is cut into tiles: a range of layers times a range of positions. Each tile is one pass over all pairs,
so a plan takes the fewest, and for equal numbers the cheapest and then the largest batches.
"""

from __future__ import annotations

import itertools
import time
from dataclasses import dataclass
from typing import Any

import torch

from microtome.arguments import parse_bytes
from microtome.circuits.attribution.settings import Settings
from microtome.circuits.forward.decoder import model_logits
from microtome.circuits.forward.restore import left_as_found
from microtome.circuits.pairs.pair_set import PairSet, as_pair_set
from microtome.errors import ShapeError

__all__ = ["POSITIONS_AT_ONCE", "Cost", "Plan", "Tile", "estimate", "plan_run", "seconds_per_prompt"]

POSITIONS_AT_ONCE = 64
"""Positions of one pair that are scored together: what scoring holds does not grow with the prompt."""


@dataclass(frozen=True)
class Tile:
    """Layers and positions that one pass over the pairs scores."""

    layers: range
    positions: slice


@dataclass(frozen=True)
class Plan:
    """How a run is carried out."""

    tiles: tuple[Tile, ...]
    batch_size: int
    points_per_pass: int
    recompute: bool
    """Layers are run again on the way down instead of keeping the graph of all."""
    bytes_needed: int
    """Estimate of what the run holds at its peak, beside the model."""


@dataclass(frozen=True)
class Cost:
    """What an attribution run will take."""

    forwards: int
    """Forwards of one pair, recomputed ones included."""
    backwards: int
    bytes_scores: int
    """Size of the scores, on disk when streamed."""
    bytes_memory: int
    """Peak beside the model."""
    tiles: int
    recompute: bool
    seconds: float
    """From timed forwards, a backward counted as two."""


def plan_run(adapter: Any, pairs: PairSet, settings: Settings, batch_size: int, budget: int | None) -> Plan:
    """The cheapest plan within ``budget`` bytes; one tile without a budget.

    Raises:
        ShapeError: not even one layer at one position fits.
    """
    if batch_size < 1:
        raise ShapeError(f"batch_size: expected 1 or more, found {batch_size}")
    sizes = _Sizes.of(adapter, pairs, settings)
    points = len(settings.points)
    if budget is None:
        needed = sizes.peak(batch_size, points, False, points, adapter.n_layers, sizes.positions)
        return Plan((Tile(range(adapter.n_layers), slice(None)),), batch_size, points, False, needed)
    batches = [b for b in (2**i for i in range(20)) if b < batch_size] + [batch_size]
    best: tuple[tuple[float, int], Plan] | None = None
    ways = (
        [(points, False)]
        if sizes.along_activations
        else list(itertools.product(range(1, points + 1), (False, True)))
    )
    for b, (n, recompute) in itertools.product(batches, ways):
        fitted = _fit(sizes, b, n, recompute, points, budget, pairs)
        if fitted is None:
            continue
        tiles, needed = fitted
        cost = len(tiles) * (1 + points * (4 if recompute else 3))
        rank = (float(cost), -b * n)
        if best is None or rank < best[0]:
            best = rank, Plan(tiles, b, n, recompute, needed)
    if best is None:
        width = 1 if pairs.align == "absolute" else sizes.positions
        least = min(sizes.peak(1, n, recompute, points, 1, width) for n, recompute in ways)
        raise ShapeError(
            f"memory_budget: expected at least {least} bytes for one layer at one position, found {budget}"
        )
    return best[1]


def _fit(
    sizes: _Sizes, b: int, n: int, recompute: bool, points: int, budget: int, pairs: PairSet
) -> tuple[tuple[Tile, ...], int] | None:
    """The largest tiles for this way of running, None when nothing fits. Positions are cut only where layers cannot be."""
    layers, positions = sizes.n_layers, sizes.positions

    def needed(n_layers: int, n_positions: int) -> int:
        return sizes.peak(b, n, recompute, points, n_layers, n_positions)

    depth = next((k for k in range(layers, 0, -1) if needed(k, positions) <= budget), 0)
    width = positions
    if not depth:
        if pairs.align != "absolute":
            return None
        width = next((w for w in range(positions, 0, -1) if needed(1, w) <= budget), 0)
        depth = 1
    if not width:
        return None
    cuts = [slice(None)] if width == positions else [slice(p, p + width) for p in range(0, positions, width)]
    starts = range(0, layers, depth)
    tiles = tuple(Tile(range(s, min(s + depth, layers)), cut) for s in starts for cut in cuts)
    return tiles, needed(depth, width)


@dataclass(frozen=True)
class _Sizes:
    """Widths that memory depends on."""

    n_layers: int
    positions: int
    slots: int
    d_model: int
    heads: int
    z: int  # H · d_head
    m: int
    itemsize: int
    keeps_attention: bool
    inputs: int
    """Bytes of the tensors of the largest pair, both sides: a batch is a copy of its pairs'."""
    along_activations: bool
    """The clean nodes of a tile and a site's path are held as well."""

    @classmethod
    def of(cls, adapter: Any, pairs: PairSet, settings: Settings) -> _Sizes:
        longest = max(pair.length for pair in pairs)
        parameter = next(adapter.model.parameters())
        return cls(
            adapter.n_layers,
            longest,
            pairs.n_slots,
            adapter.d_model,
            adapter.n_heads,
            adapter.n_heads * adapter.d_head,
            adapter.d_mlp,
            parameter.element_size(),
            adapter.attn_implementation == "eager",
            max(_bytes_of(pair) for pair in pairs),
            settings.method == "ig_activations",
        )

    def peak(self, b: int, n: int, recompute: bool, points: int, layers: int, positions: int) -> int:
        """Bytes at the peak: graph, cached counterfactual nodes, gradient sums between passes, scores.

        What autograd keeps of a layer with frozen weights, counted in tensors per token: the two norms'
        inputs and scales in float32, queries, keys, values and their rotations, the attention's output, and
        gate, its activation, up and product. On the way down a layer's MLP holds three gradients of its width at once.
        """
        tokens = b * n * self.positions
        attention = 2 * self.heads * self.positions * self.itemsize if self.keeps_attention else 0
        layer = tokens * (
            4 * 4 * self.d_model + self.itemsize * (6 * self.d_model + 5 * self.z + 5 * self.m) + attention
        )
        inputs = tokens * self.n_layers * self.d_model * self.itemsize
        graph = layer + inputs if recompute else layer * self.n_layers
        mask = 5 * b * n * self.positions**2  # boolean, and the float32 that attention makes of it
        descent = self.itemsize * tokens * (3 * self.m + 2 * self.d_model) + mask
        widest = max(self.z, self.m)
        scoring = 4 * (5 + n) * min(POSITIONS_AT_ONCE, positions) * widest
        given = (
            b * self.inputs + b * (self.itemsize * (n + 3) + 8) * self.positions * self.d_model
        )  # and embeddings along the path
        nodes = self.z + self.m
        cached = b * layers * positions * nodes * self.itemsize
        between = 4 * b * layers * positions * nodes if n < points else 0
        slots = self.slots if self.slots < self.positions else positions
        own = b * self.positions * self.itemsize * (layers * nodes + 3 * n * widest)
        given += own if self.along_activations else 0
        sums = 4 * layers * slots * (self.heads + self.m)
        return graph + descent + scoring + given + cached + between + sums


def _bytes_of(pair: Any) -> int:
    return sum(x.nbytes for side in (pair.clean, pair.corrupted) for x in side.values())


def estimate(
    model: Any,
    pairs: PairSet,
    method: str = "ig",
    steps: int = 5,
    *,
    batch_size: int = 8,
    memory_budget: int | str | None = None,
) -> Cost:
    """What :func:`microtome.circuits.attribute` will take with these arguments, from timed forwards.

    Example:
        >>> from microtome import organism
        >>> from microtome.circuits import prepare
        >>> model, processor = organism.load_model(), organism.load_processor()
        >>> pairs = prepare(model, processor, organism.pairs("colour", "textual", 4))
        >>> estimate(model, pairs, steps=5).forwards            # (1 counterfactual + 1 check + 5 points) x 4 pairs
        28
    """
    from microtome.capture.models import adapt

    pairs = as_pair_set(pairs)
    settings = Settings(method, steps, "merged", "abs_sum", False)
    settings.check()
    adapter = adapt(model)
    plan = plan_run(adapter, pairs, settings, batch_size, parse_bytes(memory_budget))
    n, points, tiles = len(pairs), len(settings.points), len(plan.tiles)
    nodes = pairs.n_slots * (adapter.n_heads + adapter.d_mlp) * adapter.n_layers
    if method == "exact":
        forwards, backwards = n * (2 + nodes), 0
    elif method == "ig_activations":
        sites = 2 * adapter.n_layers
        forwards, backwards = n * (3 + sites * points), n * sites * points
    else:
        forwards = n * tiles * (2 + points * (2 if plan.recompute else 1))
        backwards = n * tiles * points
    seconds = (forwards + 2 * backwards) * seconds_per_prompt(model, pairs, plan.batch_size)
    return Cost(forwards, backwards, 4 * nodes, plan.bytes_needed, tiles, plan.recompute, seconds)


def seconds_per_prompt(model: Any, pairs: PairSet, batch_size: int) -> float:
    """Share of one prompt in a forward of a batch, the faster of two."""
    batch = next(pairs.batches(batch_size, model.device))
    times = []
    with left_as_found(model), torch.no_grad():
        for _ in range(3):  # the first one warms up
            start = time.perf_counter()
            float(model_logits(model, batch.clean)[0, 0])
            times.append(time.perf_counter() - start)
    return min(times[1:]) / len(batch)

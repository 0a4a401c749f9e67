"""One batch of pairs through one tile (a range of layers and positions) of an attribution run."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from microtome.circuits.attribution.gradients import layer_by_layer, through_graph
from microtome.circuits.attribution.path import interpolated
from microtome.circuits.attribution.plan import POSITIONS_AT_ONCE, Plan, Tile
from microtome.circuits.attribution.settings import Settings
from microtome.circuits.circuit.nodes import NodeKind
from microtome.circuits.forward.decoder import Merged, last_logits, logit_difference
from microtome.circuits.forward.nodes import NodeValues, node_values, on_nodes
from microtome.circuits.pairs.pair_set import PairBatch, merge_pair
from microtome.errors import NonFiniteError

__all__ = ["Accumulator", "add_batch", "finite_pairs", "require_finite"]


@dataclass(eq=False)
class Accumulator:
    """Sums of scores over pairs, for the layers of a tile."""

    heads: Tensor  # (layers of the tile, slots, H)
    neurons: Tensor  # (layers of the tile, slots, m)
    n_pairs: int = 0
    n_skipped: int = 0
    batches_done: int = 0

    @property
    def n_seen(self) -> int:
        """Pairs that went through, skipped ones included."""
        return self.n_pairs + self.n_skipped

    def of(self, kind: NodeKind) -> Tensor:
        """The sums of one kind."""
        return self.heads if kind == "heads" else self.neurons


def add_batch(
    adapter: Any, batch: PairBatch, settings: Settings, plan: Plan, tile: Tile, total: Accumulator
) -> None:
    """Add the scores of a batch to ``total``. Pairs whose logit difference is not finite are counted and left out."""
    clean, corrupted = merge_pair(adapter, batch)
    reference = node_values(adapter, corrupted, tile.layers, batch.partner[:, tile.positions])
    usable = finite_pairs(adapter, clean, batch)
    add = _Add(batch, settings, tile, total, reference, usable)
    if settings.method == "ig_activations":
        _along_activations(adapter, clean, batch, settings, tile, add)
    else:
        _along_embeddings(adapter, clean, corrupted, batch, settings, plan, tile, add)
    total.n_pairs += int(usable.sum())
    total.n_skipped += int((~usable).sum())
    total.batches_done += 1


def finite_pairs(adapter: Any, clean: Merged, batch: PairBatch) -> Tensor:
    """Which pairs have a finite logit difference. Shape ``(b,)``."""
    with torch.no_grad():
        values = logit_difference(last_logits(adapter, clean), batch.answers, batch.corrupted_answers)
    return torch.isfinite(values)


@dataclass(eq=False)
class _Add:
    """Turns values and gradients of a site into scores of its slots, and adds them up."""

    batch: PairBatch
    settings: Settings
    tile: Tile
    total: Accumulator
    reference: NodeValues
    usable: Tensor  # (b,)
    gradients: NodeValues = field(default_factory=dict)

    def consume(
        self, kind: NodeKind, layer: int, x: Tensor, grad: Tensor, points: int, is_last: bool
    ) -> None:
        """Take values and gradients ``(points · b, p, ...)``, of which the last copy is the clean one when ``is_last``."""
        site = kind, layer
        there = self.tile.positions
        parts = grad.unflatten(0, (points, -1))[:, :, there]  # (points, b, p, ...)
        if not is_last:
            summed = parts.float().sum(0)
            self.gradients[site] = summed.add_(self.gradients.pop(site)) if site in self.gradients else summed
            return
        earlier, reference = self.gradients.pop(site, None), self.reference.pop(site)
        clean = x.unflatten(0, (points, -1))[-1, :, there]
        into = self.total.of(kind)[layer - self.tile.layers.start]  # (slots, width)
        for row in self.usable.nonzero()[:, 0].tolist():
            slots = self.batch.slots[row, there]
            # Positions of one slot are summed before the absolute value is taken.
            distinct = len(slots.unique()) == len(slots)
            sums = into if distinct else torch.zeros_like(into)
            for start in range(0, len(slots), POSITIONS_AT_ONCE):
                at = slice(start, start + POSITIONS_AT_ONCE)
                slope = parts[:, row, at].float().sum(0)
                if earlier is not None:
                    slope += earlier[row, at]
                product = (reference[row, at].float() - clean[row, at].float()) * slope
                product /= len(self.settings.points)
                require_finite(product, f"attribution: layer {layer} {kind}: gradients")
                scores = self._reduced(kind, product)
                sums.index_add_(
                    0, slots[at], scores.abs() if distinct and not self.settings.signed else scores
                )
            if not distinct:
                into += sums if self.settings.signed else sums.abs_()

    def _reduced(self, kind: NodeKind, product: Tensor) -> Tensor:
        """(p, H, d_head) or (p, m) to one number per node (p, width)."""
        if kind == "neurons":
            return product
        if self.settings.head_reduce == "sum_abs":
            return product.abs().sum(-1)
        return product.sum(-1)


def _along_embeddings(
    adapter: Any,
    clean: Merged,
    corrupted: Merged,
    batch: PairBatch,
    settings: Settings,
    plan: Plan,
    tile: Tile,
    add: _Add,
) -> None:
    """Gradients at interpolated merged embeddings, ``plan.points_per_pass`` points in one forward and backward."""
    run = layer_by_layer if plan.recompute else through_graph
    points = settings.points
    ids = batch.clean["input_ids"]
    for start in range(0, len(points), plan.points_per_pass):
        chunk = points[start : start + plan.points_per_pass]
        n, is_last = len(chunk), start + len(chunk) == len(points)
        answers = batch.answers.repeat(n), batch.corrupted_answers.repeat(n)
        merged = interpolated(adapter, clean, corrupted, batch.partner, chunk, settings.ig_path, ids)
        objective = partial(_difference, answers=answers)
        run(adapter, merged, objective, partial(add.consume, points=n, is_last=is_last), tile.layers)


def _difference(logits: Tensor, answers: tuple[Tensor, Tensor]) -> Tensor:
    return logit_difference(logits, *answers)


def _along_activations(
    adapter: Any, clean: Merged, batch: PairBatch, settings: Settings, tile: Tile, add: _Add
) -> None:
    """Gradients at each layer's own interpolated activations, one layer and kind at a time."""
    values = node_values(adapter, clean, tile.layers)
    points = settings.points
    answers, others = batch.answers.repeat(len(points)), batch.corrupted_answers.repeat(len(points))
    many = clean.repeat(len(points))
    for site, own in values.items():
        reference = own.clone()
        reference[:, tile.positions] = add.reference[site]
        path = torch.cat([reference + alpha * (own - reference) if alpha < 1 else own for alpha in points])
        leaf = path.detach().requires_grad_()
        with torch.enable_grad(), on_nodes(adapter, _put(leaf, site[0]), [site[1]]):
            difference = logit_difference(last_logits(adapter, many), answers, others)
        (grad,) = torch.autograd.grad(difference.sum(), leaf)
        add.consume(*site, leaf.detach(), grad, len(points), True)


def _put(values: Tensor, wanted: NodeKind) -> Any:
    return lambda kind, _layer, _x: values if kind == wanted else None


def require_finite(values: Tensor, what: str) -> None:
    """Refuse NaN and infinity.

    Raises:
        NonFiniteError: there are some.
    """
    bad = int((~torch.isfinite(values)).sum())
    if bad:
        raise NonFiniteError(f"{what}: expected finite numbers, found {bad} of {values.numel()} that are not")

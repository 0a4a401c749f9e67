"""What overwrites the nodes outside a circuit: counterfactual, mean, zero or resampled values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, get_args

import numpy as np
import torch

from microtome.circuits.circuit.nodes import KINDS
from microtome.circuits.forward.decoder import merge
from microtome.circuits.forward.nodes import NodeValues, node_values, partnered
from microtome.circuits.pairs.pair_set import PairBatch, PairSet
from microtome.errors import ShapeError

__all__ = ["ABLATIONS", "Ablation", "Replacements", "mean_values", "require_one_layout"]

Ablation = Literal["counterfactual", "mean", "mean_positional", "zero", "resample"]
ABLATIONS: tuple[Ablation, ...] = get_args(Ablation)


class Replacements:
    """Replacement values of one ablation, for batches of pairs."""

    def __init__(
        self, adapter: Any, reference: PairSet, pairs: PairSet, ablation: str, seed: int, batch_size: int
    ) -> None:
        self._adapter, self._reference, self._ablation = adapter, reference, ablation
        self._means: NodeValues = {}
        if ablation.startswith("mean"):
            self._means = mean_values(adapter, reference, ablation == "mean_positional", batch_size)
        if ablation == "resample":
            self._donors = _donors(reference, pairs, seed)

    def of(self, batch: PairBatch, counterfactual: Callable[[], NodeValues]) -> NodeValues:
        """Values that broadcast to ``(b, p, ...)``; ``counterfactual`` gives those of the batch's counterfactual prompts."""
        if self._ablation == "counterfactual":
            return {site: partnered(x, batch.partner) for site, x in counterfactual().items()}
        if self._ablation == "zero":
            zero = torch.zeros((), dtype=self._adapter.model.dtype, device=batch.answers.device)
            return {(kind, layer): zero for kind in KINDS for layer in range(self._adapter.n_layers)}
        if self._ablation == "resample":
            return self._resampled(batch)
        if self._ablation == "mean_positional":
            return {site: mean[batch.slots] for site, mean in self._means.items()}
        return {site: mean[None, None] for site, mean in self._means.items()}

    def _resampled(self, batch: PairBatch) -> NodeValues:
        chosen = self._reference[[int(self._donors[i]) for i in batch.indices]]
        values: NodeValues = {}
        for donor in chosen.batches(len(batch), batch.answers.device):
            for site, x in node_values(self._adapter, merge(self._adapter, donor.clean)).items():
                into = values.setdefault(site, x.new_zeros(len(batch), *x.shape[1:]))
                if into.shape[1] != x.shape[1]:
                    raise ShapeError("resample: expected prompts of one length, found several")
                into[list(donor.indices)] = x
        return values


def require_one_layout(reference: PairSet, pairs: PairSet) -> None:
    """Refuse means over positions that are not those of the pairs.

    Raises:
        ShapeError: positions or groups differ.
    """
    ours, theirs = ((x.align, x.n_slots, x.groups) for x in (pairs, reference))
    if ours != theirs:
        raise ShapeError(
            f"reference: expected the {ours[1]} positions and the groups of the pairs, found {theirs[1]} positions"
            f"{' in other groups' if ours[1] == theirs[1] else ''}. Use one template, or ablation='mean'"
        )


def _donors(reference: PairSet, pairs: PairSet, seed: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """For every pair the place of another prompt of its length, drawn uniformly.

    Raises:
        ShapeError: a pair is the only prompt of its length.
    """
    rng = np.random.default_rng(seed)
    kinds: dict[tuple[str, ...], list[int]] = {}
    for i, donor in enumerate(reference):
        kinds.setdefault(donor.kinds, []).append(i)
    chosen = np.zeros(len(pairs), np.int64)
    for i, pair in enumerate(pairs):
        others = [j for j in kinds.get(pair.kinds, []) if reference.pairs[j] is not pair]
        if not others:
            raise ShapeError(
                f"resample: pair {i}: expected another reference prompt of its layout, found none"
            )
        chosen[i] = others[rng.integers(len(others))]
    return chosen


def mean_values(adapter: Any, pairs: PairSet, positional: bool, batch_size: int) -> NodeValues:
    """Mean node values over the clean prompts: ``(slots, ...)`` when ``positional``, else over positions as well ``(...)``."""
    sums: NodeValues = {}
    counts = torch.zeros(pairs.n_slots, dtype=torch.float64)
    dtype = torch.float32
    for batch in pairs.batches(batch_size, adapter.model.device):
        slots = batch.slots.reshape(-1)
        counts += torch.bincount(slots.cpu(), minlength=pairs.n_slots)
        for site, x in node_values(adapter, merge(adapter, batch.clean)).items():
            dtype = x.dtype
            total = sums.setdefault(
                site, torch.zeros(pairs.n_slots, *x.shape[2:], dtype=torch.float64, device=x.device)
            )
            total.index_add_(0, slots, x.flatten(0, 1).double())
    if not positional:
        return {
            site: (total.sum(0) / counts.sum().to(total.device)).to(dtype) for site, total in sums.items()
        }
    share = counts.clamp(min=1)
    return {
        site: (total / share.to(total.device).reshape(-1, *[1] * (total.ndim - 1))).to(dtype)
        for site, total in sums.items()
    }

"""Exact activation patching: the measured effect of one node at a time, the truth that attribution approximates.

For node u: LD(p with a_u := a_u(p')) - LD(p). Many variants of a pair go through one forward, each with its
own node patched.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from microtome.circuits.attribution.settings import Settings
from microtome.circuits.attribution.streaming import another_run, provenance
from microtome.circuits.circuit.nodes import KINDS, Circuit, CircuitShape, NodeKind
from microtome.circuits.circuit.scores import NodeScores
from microtome.circuits.forward.decoder import Merged, last_logits, logit_difference
from microtome.circuits.forward.nodes import NodeValues, node_values, on_nodes, partnered
from microtome.circuits.pairs.pair_set import PairBatch, PairSet, merge_pair
from microtome.errors import ShapeError
from microtome.progress import bar

__all__ = ["exact_scores"]

_VARIANTS_PER_PAIR = 16
Nodes = npt.NDArray[np.int64]


def exact_scores(
    adapter: Any, pairs: PairSet, nodes: Circuit | None, settings: Settings, batch_size: int,
    out: str | Path | None, progress: bool,
) -> NodeScores:  # fmt: skip
    """Patch ``nodes`` (all when None) one by one; absolute effects per pair, mean over pairs, NaN for the others.

    With ``out`` they are kept there, and read again when they are of the same nodes, pairs, settings and weights.
    """
    shape = CircuitShape(adapter.n_layers, pairs.n_slots, adapter.n_heads, adapter.d_mlp)
    wanted = nodes if nodes is not None else Circuit.full(shape)
    if wanted.shape != shape:
        raise ShapeError(f"nodes: expected a circuit of shape {tuple(shape)}, found {tuple(wanted.shape)}")
    told = [hashlib.blake2b(wanted.bits(kind).words.tobytes(), digest_size=16).hexdigest() for kind in KINDS]
    facts = provenance(adapter, pairs, settings, told)
    folder = None if out is None else Path(out)
    if folder is not None and any((folder / name).exists() for name in ("scores.json", "run.json")):
        return _kept(folder, facts["identity"])
    sums = {kind: np.zeros(shape.of(kind)) for kind in KINDS}
    at: dict[NodeKind, Nodes] = {kind: np.argwhere(wanted.mask(kind)) for kind in KINDS}
    n_variants = batch_size * _VARIANTS_PER_PAIR
    total, n_pairs, seen = sum(len(x) for x in at.values()) * len(pairs), 0, 0
    with torch.no_grad(), bar("exact patching", total, progress, "nodes") as done:
        for batch in pairs.batches(1, adapter.model.device):
            clean, corrupted = merge_pair(adapter, batch)
            values = {
                site: partnered(x, batch.partner) for site, x in node_values(adapter, corrupted).items()
            }
            base = logit_difference(last_logits(adapter, clean), batch.answers, batch.corrupted_answers)
            if not bool(torch.isfinite(base)):
                continue
            n_pairs += 1
            for kind, places in at.items():
                for start in range(0, len(places), n_variants):
                    chunk = places[start : start + n_variants]
                    effects = _effects(adapter, batch, clean, values, kind, chunk) - float(base)
                    sums[kind][tuple(chunk.T)] += effects if settings.signed else np.abs(effects)
                    seen += len(chunk)
                    done(seen)
    means: dict[NodeKind, Any] = {}
    for kind, total_of in sums.items():
        mean = total_of / n_pairs if n_pairs else np.full_like(total_of, np.nan)
        means[kind] = np.where(wanted.mask(kind), mean, np.nan).astype(np.float32)
    scores = NodeScores(
        means["heads"], means["neurons"], n_pairs, len(pairs) - n_pairs, settings.signed, pairs.groups, facts
    )
    if folder is not None:
        scores.save(folder)
    return scores


def _kept(folder: Path, identity: str) -> NodeScores:
    """Scores that an earlier run left behind.

    Raises:
        StoreError: they are of something else.
    """
    scores = NodeScores.load(folder) if (folder / "scores.json").exists() else None
    if scores is None or scores.facts.get("identity") != identity:
        raise another_run(folder)
    return scores


def _effects(
    adapter: Any, batch: PairBatch, clean: Merged, values: NodeValues, kind: NodeKind, nodes: Nodes
) -> npt.NDArray[np.float64]:
    """LD of one pair with each of ``nodes`` (n, 3: layer, slot, index) patched alone. Shape ``(n,)``."""
    rows = {layer: np.flatnonzero(nodes[:, 0] == layer) for layer in np.unique(nodes[:, 0])}
    slots = batch.slots[0]

    def patch(found: NodeKind, layer: int, x: Tensor) -> Tensor | None:
        if found != kind:
            return None
        x = x.clone()
        for row in rows[layer]:
            where = (slots == int(nodes[row, 1])).nonzero()[:, 0]
            x[row, where, nodes[row, 2]] = values[kind, layer][0, where, nodes[row, 2]]
        return x

    n = len(nodes)
    with on_nodes(adapter, patch, [int(layer) for layer in rows]):
        logits = last_logits(adapter, clean.repeat(n))
    found = logit_difference(logits, batch.answers.repeat(n), batch.corrupted_answers.repeat(n))
    return np.asarray(found.double().cpu())

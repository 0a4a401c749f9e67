"""How much of a model's behaviour a circuit keeps (same-task-different-circuits, A7; integrated metrics of MIB, A8).

The clean prompt runs with every node outside the circuit overwritten; the embeddings stay those of the clean
prompt. Per pair

    F(c) = [LD_c - LD_∅] / [LD_M - LD_∅]

where ∅ overwrites all nodes and M none. The clean, counterfactual and empty runs are shared by all circuits
of a call: every further circuit costs one forward per pair.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import polars as pl
import torch
from torch import Tensor

from microtome.circuits.circuit.nodes import Circuit, CircuitShape
from microtome.circuits.forward.decoder import (
    Kind,
    as_pair_set,
    last_logits,
    left_as_found,
    logit_difference,
    merge_pair,
    node_values,
    on_nodes,
)
from microtome.circuits.pairs.pair_set import PairBatch, PairSet
from microtome.circuits.ablation.replacements import ABLATIONS, Replacements, Values
from microtome.circuits.circuit.scores import SIZES, NodeScores
from microtome.circuits.statistics import Interval, bootstrap
from microtome.errors import ShapeError
from microtome.progress import bar

__all__ = ["EPSILON", "Curve", "Faithfulness", "faithfulness", "faithfulness_curve", "faithfulness_of"]

Ablation = Literal["counterfactual", "mean", "mean_positional", "zero", "resample"]
Vector = npt.NDArray[np.float64]

EPSILON = 1e-3
"""Pairs with |LD_M - LD_∅| below this have no ratio."""


@dataclass(frozen=True, eq=False)
class Faithfulness:
    """Faithfulness of one circuit."""

    circuit: Vector = field(repr=False)
    """LD_c of every pair."""
    empty: Vector = field(repr=False)
    """LD_∅ of every pair."""
    full: Vector = field(repr=False)
    """LD_M of every pair."""
    average: Literal["ratios", "means"] = "ratios"
    ablation: str = "counterfactual"
    size: int = 0
    """Nodes of the circuit."""

    @property
    def ratios(self) -> Vector:
        """F of every pair, not clipped; NaN where |LD_M - LD_∅| < ``EPSILON``."""
        span = self.full - self.empty
        out = np.full(len(span), np.nan)
        np.divide(self.circuit - self.empty, span, out=out, where=np.abs(span) >= EPSILON)
        return out

    @property
    def n_dropped(self) -> int:
        """Pairs without a ratio."""
        return int(np.isnan(self.ratios).sum())

    @property
    def mean_of_ratios(self) -> float:
        """Mean of the pairs' ratios, the paper's formula; NaN when no pair has one."""
        ratios = self.ratios[~np.isnan(self.ratios)]
        return float(ratios.mean()) if len(ratios) else float("nan")

    @property
    def ratio_of_means(self) -> float:
        """Ratio of the mean differences, as MIB does it."""
        return _ratio_of_means(self.circuit, self.empty, self.full)

    @property
    def value(self) -> float:
        """The average that was asked for."""
        return self.mean_of_ratios if self.average == "ratios" else self.ratio_of_means

    def interval(self, n_resamples: int = 1000, seed: int = 0, level: float = 0.95) -> Interval:
        """Bootstrap interval of the value, pairs resampled."""
        if self.average == "ratios":
            return bootstrap(
                lambda r: float(np.mean(r)), [self.ratios[~np.isnan(self.ratios)]], n_resamples, seed, level
            )
        return bootstrap(_ratio_of_means, [self.circuit, self.empty, self.full], n_resamples, seed, level)

    def __float__(self) -> float:
        return self.value


def _ratio_of_means(circuit: Vector, empty: Vector, full: Vector) -> float:
    span = float(np.mean(full - empty))
    return float(np.mean(circuit - empty)) / span if abs(span) >= EPSILON else float("nan")


def faithfulness(
    model: Any,
    pairs: PairSet,
    circuit: Circuit,
    ablation: Ablation = "counterfactual",
    *,
    average: Literal["ratios", "means"] = "ratios",
    reference: PairSet | None = None,
    seed: int = 0,
    batch_size: int = 16,
    progress: bool = True,
) -> Faithfulness:
    """How much of the logit difference a circuit alone keeps.

    Args:
        model: a transformers model; left as it was found.
        pairs: prepared pairs, with the positions of the circuit.
        circuit: what is kept.
        ablation: what overwrites the rest: the pair's ``"counterfactual"``, the ``"mean"`` of the reference
            prompts (over prompts and positions; ``"mean_positional"`` over prompts), ``"zero"``, or
            ``"resample"``: another reference prompt.
        average: ``"ratios"`` for the mean of per-pair ratios, ``"means"`` for the ratio of means.
        reference: prompts of the mean and of resampling; ``pairs`` when None.
        seed: of resampling.
        batch_size: pairs per forward.
        progress: show a bar.

    Raises:
        ShapeError: the circuit has other layers, positions or widths than the model and the pairs.

    Example:
        >>> from microtome import organism
        >>> from microtome.circuits import attribute, prepare
        >>> model, processor = organism.load_model(), organism.load_processor()
        >>> pairs = prepare(model, processor, organism.pairs("colour", "textual", 4))
        >>> all_nodes = attribute(model, pairs).circuit(1.0)
        >>> round(float(faithfulness(model, pairs, all_nodes)), 6)
        1.0
    """
    return faithfulness_of(
        model,
        pairs,
        [circuit],
        ablation,
        average=average,
        reference=reference,
        seed=seed,
        batch_size=batch_size,
        progress=progress,
    )[0]


def faithfulness_of(
    model: Any,
    pairs: PairSet,
    circuits: Sequence[Circuit],
    ablation: Ablation = "counterfactual",
    *,
    average: Literal["ratios", "means"] = "ratios",
    reference: PairSet | None = None,
    seed: int = 0,
    batch_size: int = 16,
    progress: bool = True,
) -> list[Faithfulness]:
    """:func:`faithfulness` of many circuits, which share the clean, counterfactual and empty runs."""
    from microtome.capture.models import adapt

    pairs = as_pair_set(pairs)
    if ablation not in ABLATIONS:
        raise ShapeError(f"ablation: expected one of {', '.join(ABLATIONS)}, found {ablation!r}")
    if average not in ("ratios", "means"):
        raise ShapeError(f"average: expected ratios or means, found {average!r}")
    adapter = adapt(model)
    shape = CircuitShape(adapter.n_layers, pairs.n_slots, adapter.n_heads, adapter.d_mlp)
    for i, circuit in enumerate(circuits):
        if circuit.shape != shape:
            raise ShapeError(
                f"circuit {i}: expected shape {tuple(shape)} of model and pairs, found {tuple(circuit.shape)}"
            )
    differences = np.full((len(circuits) + 2, len(pairs)), np.nan)
    with left_as_found(model), torch.no_grad(), bar("faithfulness", len(pairs), progress, "pairs") as done:
        replacements = Replacements(adapter, reference or pairs, pairs, ablation, seed, batch_size)
        seen = 0
        for batch in pairs.batches(batch_size, model.device):
            differences[:, list(batch.indices)] = _differences(adapter, batch, circuits, replacements)
            seen += len(batch)
            done(seen)
    *kept, empty, full = differences
    return [
        Faithfulness(row, empty, full, average, ablation, len(circuit))
        for row, circuit in zip(kept, circuits, strict=True)
    ]


def _differences(
    adapter: Any, batch: PairBatch, circuits: Sequence[Circuit], replacements: Replacements
) -> npt.NDArray[np.float64]:
    """LD of every circuit, of none and of all nodes. Shape ``(circuits + 2, b)``."""
    clean, corrupted = merge_pair(adapter, batch)
    values = replacements.of(batch, lambda: node_values(adapter, corrupted))

    def difference(circuit: Circuit | None) -> npt.NDArray[np.float64]:
        with on_nodes(adapter, _keeping(circuit, values, batch.slots)):
            logits = last_logits(adapter, clean)
        found = logit_difference(logits, batch.answers, batch.corrupted_answers)
        return np.asarray(found.double().cpu())

    full = logit_difference(last_logits(adapter, clean), batch.answers, batch.corrupted_answers)
    rows = [difference(circuit) for circuit in circuits]
    return np.stack([*rows, difference(None), full.double().cpu().numpy()])


def _keeping(circuit: Circuit | None, values: Values, slots: Tensor) -> Any:
    """A visitor that overwrites every node outside ``circuit`` (everything when None)."""

    def visit(kind: Kind, layer: int, x: Tensor) -> Tensor:
        replaced = values[kind, layer]
        if circuit is None:
            return replaced.expand_as(x)
        mask = torch.from_numpy(circuit.layer_mask(kind, layer)).to(x.device)[slots]  # (b, p, width)
        return torch.where(mask[..., None] if kind == "heads" else mask, x, replaced)

    return visit


@dataclass(frozen=True, eq=False)
class Curve:
    """Faithfulness over circuit sizes."""

    sizes: Vector
    points: tuple[Faithfulness, ...]

    @property
    def values(self) -> Vector:
        """F at every size."""
        return np.array([point.value for point in self.points])

    def smallest(self, threshold: float = 0.8) -> float | None:
        """The first size whose faithfulness exceeds ``threshold``; None when none does."""
        above = np.flatnonzero(self.values > threshold)
        return float(self.sizes[above[0]]) if len(above) else None

    def cpr(self, log: bool = False) -> float:
        """Integrated circuit performance ratio, ∫ F dρ by trapezoids; higher is better (MIB)."""
        return _integral(self.values, self.sizes, log)

    def cmd(self, log: bool = False) -> float:
        """Integrated circuit-model distance, ∫ |1 - F| dρ; 0 is best (MIB)."""
        return _integral(np.abs(1 - self.values), self.sizes, log)

    def to_polars(self, n_resamples: int = 1000, seed: int = 0) -> pl.DataFrame:
        """One row per size: size, faithfulness, low, high, ratio_of_means, n_nodes, n_dropped."""
        intervals = [point.interval(n_resamples, seed) for point in self.points]
        return pl.DataFrame(
            {
                "size": self.sizes,
                "faithfulness": self.values,
                "low": [interval.low for interval in intervals],
                "high": [interval.high for interval in intervals],
                "ratio_of_means": [point.ratio_of_means for point in self.points],
                "n_nodes": [point.size for point in self.points],
                "n_dropped": [point.n_dropped for point in self.points],
            }
        )


def _integral(values: Vector, sizes: Vector, log: bool) -> float:
    keep = sizes > 0 if log else np.ones(len(sizes), bool)
    axis = np.log(sizes[keep]) if log else sizes[keep]
    return float(np.trapezoid(values[keep], axis))


def faithfulness_curve(
    model: Any,
    pairs: PairSet,
    scores: NodeScores,
    sizes: Sequence[float] = SIZES,
    ablation: Ablation = "counterfactual",
    *,
    average: Literal["ratios", "means"] = "ratios",
    by: Literal["absolute", "signed"] = "absolute",
    joint: bool = False,
    reference: PairSet | None = None,
    seed: int = 0,
    batch_size: int = 16,
    progress: bool = True,
) -> Curve:
    """Faithfulness of the circuits of all ``sizes`` selected from ``scores``, by default the 27 sizes of the paper.

    For MIB's grid and integrals use ``sizes=microtome.circuits.MIB_SIZES, average="means"``.

    Raises:
        ShapeError: no size, or sizes that do not rise.
    """
    if not len(sizes) or any(b <= a for a, b in itertools.pairwise(sizes)):
        raise ShapeError(f"sizes: expected rising shares, found {list(sizes)}")
    chosen = [scores.circuit(size, by=by, joint=joint) for size in sizes]
    points = faithfulness_of(
        model,
        pairs,
        chosen,
        ablation,
        average=average,
        reference=reference,
        seed=seed,
        batch_size=batch_size,
        progress=progress,
    )
    return Curve(np.asarray(sizes, np.float64), tuple(points))

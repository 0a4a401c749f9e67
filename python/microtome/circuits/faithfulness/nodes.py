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
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from microtome.arguments import require_one_of
from microtome.circuits.ablation.replacements import ABLATIONS, Ablation, Replacements, require_one_layout
from microtome.circuits.circuit.nodes import KINDS, Circuit, CircuitShape, NodeKind
from microtome.circuits.circuit.scores import SIZES, NodeScores
from microtome.circuits.faithfulness.results import Curve, Faithfulness
from microtome.circuits.forward.decoder import last_logits, logit_difference
from microtome.circuits.forward.nodes import NodeValues, node_values, on_nodes
from microtome.circuits.forward.restore import left_as_found
from microtome.circuits.pairs.pair_set import PairBatch, PairSet, as_pair_set, check_first, merge_pair
from microtome.errors import ShapeError
from microtome.progress import bar

__all__ = ["faithfulness", "faithfulness_curve", "faithfulness_of", "patching_map"]


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
        ShapeError: the circuit has other layers, positions or widths than the model and the pairs, or the reference of
            ``"mean_positional"`` has another layout than these.

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
    reference = pairs if reference is None else as_pair_set(reference)
    require_one_of("ablation", ablation, ABLATIONS)
    if ablation == "mean_positional":
        require_one_layout(reference, pairs)
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
        check_first(adapter, pairs)
        replacements = Replacements(adapter, reference, pairs, ablation, seed, batch_size)
        for batch in pairs.batches(batch_size, model.device, done):
            differences[:, list(batch.indices)] = _differences(adapter, batch, circuits, replacements)
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


def _keeping(circuit: Circuit | None, values: NodeValues, slots: Tensor) -> Any:
    """A visitor that overwrites every node outside ``circuit`` (everything when None)."""

    def visit(kind: NodeKind, layer: int, x: Tensor) -> Tensor:
        replaced = values[kind, layer]
        if circuit is None:
            return replaced.expand_as(x)
        mask = torch.from_numpy(circuit.layer_mask(kind, layer)).to(x.device)[slots]  # (b, p, width)
        return torch.where(mask[..., None] if kind == "heads" else mask, x, replaced)

    return visit


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


def patching_map(
    model: Any, pairs: PairSet, *, batch_size: int = 16, progress: bool = True
) -> npt.NDArray[np.float64]:
    """Measured patching effects over layer and position (A12): mean |LD with all nodes there patched - LD|. Shape ``(L, P)``.

    One forward per layer and position; :meth:`NodeScores.effect_map` is its approximation.
    """
    from microtome.capture.models import adapt

    pairs = as_pair_set(pairs)
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

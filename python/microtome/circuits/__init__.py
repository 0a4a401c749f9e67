"""Circuits across modalities: which nodes do a task, how faithful they are, what two modalities share, and what repairs them.

Rooms, from the ground up; each imports only those of the lines before its own.

    statistics     intervals and tests
    circuit/       sets of nodes and edges, their scores, what two sets share
    forward/       one forward of the model: run, listened to, overwritten
    pairs/         clean prompts and their counterfactuals, as tensors
    attribution/   scores of nodes and edges    ablation/  what is taken out, what is lost    backpatch/  late values put early
    faithfulness/  how much a circuit alone keeps
    interchange    sub-circuits exchanged between two forms of a task
    study/         all of it on one model

Circuits, scores and statistics are NumPy alone; whatever runs a model needs torch.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

from microtome.circuits.backpatch.choice import BackPatch, Choice, Setting, all_settings, gap_closed
from microtome.circuits.circuit.edges import EdgeGraph
from microtome.circuits.circuit.nodes import Circuit, CircuitShape
from microtome.circuits.circuit.overlap import circuit_iou, circuit_niou, compare_circuits
from microtome.circuits.circuit.positions import PositionMap
from microtome.circuits.circuit.scores import MIB_SIZES, SIZES, NodeScores
from microtome.circuits.statistics import Interval, bootstrap, jackknife, mcnemar, rank_correlation
from microtome.metrics import expected_iou
from microtome.tensors import extra

if find_spec("torch") is not None:
    from microtome.circuits.ablation.attention_maps import AttentionMap, attention_maps
    from microtome.circuits.ablation.causal import ablation_table, causal_test
    from microtome.circuits.ablation.controls import attributed_heads, matched_features, random_heads
    from microtome.circuits.ablation.interventions import ablate_features, ablate_heads, head_means
    from microtome.circuits.ablation.outcomes import NO, YES, Effect, Outcome, effect_of, outcome, token_group
    from microtome.circuits.attribution.audit import completeness, exact_agreement
    from microtome.circuits.attribution.blocks import Blocks, attribute_blocks, overlap_intervals, split_half
    from microtome.circuits.attribution.edges import attribute_edges
    from microtome.circuits.attribution.features import (
        FeatureScores,
        MeanEmbedding,
        feature_attribution,
        mean_embedding,
    )
    from microtome.circuits.attribution.nodes import attribute
    from microtome.circuits.attribution.plan import Cost, estimate
    from microtome.circuits.backpatch.alignment import alignment
    from microtome.circuits.backpatch.patching import back_patch, back_patch_iterated
    from microtome.circuits.faithfulness.edges import (
        edge_faithfulness,
        edge_faithfulness_curve,
        edge_faithfulness_of,
    )
    from microtome.circuits.faithfulness.nodes import (
        faithfulness,
        faithfulness_curve,
        faithfulness_of,
        patching_map,
    )
    from microtome.circuits.faithfulness.results import Curve, Faithfulness
    from microtome.circuits.forward.restore import attention_implementation
    from microtome.circuits.interchange import Interchange, interchange
    from microtome.circuits.pairs.fingerprints import pairs_fingerprint, weights_fingerprint
    from microtome.circuits.pairs.pair_set import GROUPS, PairSet, PreparedPair
    from microtome.circuits.pairs.preparation import prepare

__all__ = [
    "GROUPS",
    "MIB_SIZES",
    "NO",
    "SIZES",
    "YES",
    "AttentionMap",
    "BackPatch",
    "Blocks",
    "Choice",
    "Circuit",
    "CircuitShape",
    "Cost",
    "Curve",
    "EdgeGraph",
    "Effect",
    "Faithfulness",
    "FeatureScores",
    "Interchange",
    "Interval",
    "MeanEmbedding",
    "NodeScores",
    "Outcome",
    "PairSet",
    "PositionMap",
    "PreparedPair",
    "Setting",
    "ablate_features",
    "ablate_heads",
    "ablation_table",
    "alignment",
    "all_settings",
    "attention_implementation",
    "attention_maps",
    "attribute",
    "attribute_blocks",
    "attribute_edges",
    "attributed_heads",
    "back_patch",
    "back_patch_iterated",
    "bootstrap",
    "causal_test",
    "circuit_iou",
    "circuit_niou",
    "compare_circuits",
    "completeness",
    "edge_faithfulness",
    "edge_faithfulness_curve",
    "edge_faithfulness_of",
    "effect_of",
    "estimate",
    "exact_agreement",
    "expected_iou",
    "faithfulness",
    "faithfulness_curve",
    "faithfulness_of",
    "feature_attribution",
    "gap_closed",
    "head_means",
    "interchange",
    "jackknife",
    "matched_features",
    "mcnemar",
    "mean_embedding",
    "outcome",
    "overlap_intervals",
    "pairs_fingerprint",
    "patching_map",
    "prepare",
    "random_heads",
    "rank_correlation",
    "split_half",
    "token_group",
    "weights_fingerprint",
]


def __getattr__(name: str) -> Any:
    if name in __all__:
        extra("torch", "models")
    raise AttributeError(f"module 'microtome.circuits' has no attribute {name!r}")

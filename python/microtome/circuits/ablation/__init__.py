"""Heads, features and nodes taken out, and what the answers lose by it.

``replacements`` what is put in the place of nodes · ``interventions`` on heads and features, as context managers ·
``controls`` drawn beside them · ``outcomes`` answers with and without · ``causal`` tests against the controls ·
``attention_maps`` what the chosen heads look at.
"""

from microtome.circuits.ablation.controls import attributed_heads, matched_features, random_heads
from microtome.circuits.ablation.interventions import Heads, ablate_features, ablate_heads, head_means

__all__ = [
    "Heads",
    "ablate_features",
    "ablate_heads",
    "attributed_heads",
    "head_means",
    "matched_features",
    "random_heads",
]

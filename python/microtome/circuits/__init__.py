"""Circuits across modalities: which nodes do a task, how faithful they are, what two modalities share, and what repairs them.

Circuits and scores are NumPy alone; whatever runs a model needs torch.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

from microtome.circuits.circuit import Circuit, CircuitShape
from microtome.circuits.scores import MIB_SIZES, SIZES, NodeScores
from microtome.circuits.statistics import Interval, bootstrap, mcnemar
from microtome.tensors import extra

if find_spec("torch") is not None:
    from microtome.circuits.attribution import attribute
    from microtome.circuits.faithfulness import (
        Curve,
        Faithfulness,
        faithfulness,
        faithfulness_curve,
        faithfulness_of,
    )
    from microtome.circuits.pairs import GROUPS, PairSet, PreparedPair, prepare
    from microtome.circuits.plan import Cost, estimate

__all__ = [
    "GROUPS",
    "MIB_SIZES",
    "SIZES",
    "Circuit",
    "CircuitShape",
    "Cost",
    "Curve",
    "Faithfulness",
    "Interval",
    "NodeScores",
    "PairSet",
    "PreparedPair",
    "attribute",
    "bootstrap",
    "estimate",
    "faithfulness",
    "faithfulness_curve",
    "faithfulness_of",
    "mcnemar",
    "prepare",
]


def __getattr__(name: str) -> Any:
    if name in __all__:
        extra("torch", "models")
    raise AttributeError(f"module 'microtome.circuits' has no attribute {name!r}")

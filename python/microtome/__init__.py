"""microtome: activation analytics of vision-language models.

Importing microtome needs numpy and polars alone. Names that need torch or transformers load their module on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from microtome import errors
from microtome._core import __version__, num_threads
from microtome.threads import set_num_threads

if TYPE_CHECKING:
    from microtome.capture import Recorder, capture
    from microtome.circuits import (
        Circuit,
        NodeScores,
        attribute,
        circuit_iou,
        circuit_niou,
    )
    from microtome.circuits.faithfulness import faithfulness
    from microtome.dictionary import SAE
    from microtome.metrics import (
        Analysis,
        FeatureStats,
        OddsRatio,
        SparseCodes,
        TopKEncoder,
        analyse,
        cka_matrix,
        decoder_cosine,
        expected_iou,
        feature_stats,
        fvu,
        linear_cka,
        match_features,
        odds_ratio,
        top_samples,
        topk_encode,
        variance_gap,
    )
    from microtome.store import Activations, ActivationStore

_ROOM_OF = {
    "Recorder": "capture",
    "capture": "capture",
    "Activations": "store",
    "ActivationStore": "store",
    "Analysis": "metrics",
    "FeatureStats": "metrics",
    "OddsRatio": "metrics",
    "SparseCodes": "metrics",
    "TopKEncoder": "metrics",
    "analyse": "metrics",
    "cka_matrix": "metrics",
    "decoder_cosine": "metrics",
    "expected_iou": "metrics",
    "feature_stats": "metrics",
    "fvu": "metrics",
    "linear_cka": "metrics",
    "match_features": "metrics",
    "odds_ratio": "metrics",
    "top_samples": "metrics",
    "topk_encode": "metrics",
    "variance_gap": "metrics",
    "SAE": "dictionary",
    "Circuit": "circuits",
    "NodeScores": "circuits",
    "attribute": "circuits",
    "circuit_iou": "circuits",
    "circuit_niou": "circuits",
    "faithfulness": "circuits",
}

__all__ = [
    "SAE",
    "ActivationStore",
    "Activations",
    "Analysis",
    "Circuit",
    "FeatureStats",
    "NodeScores",
    "OddsRatio",
    "Recorder",
    "SparseCodes",
    "TopKEncoder",
    "__version__",
    "analyse",
    "attribute",
    "capture",
    "circuit_iou",
    "circuit_niou",
    "cka_matrix",
    "decoder_cosine",
    "errors",
    "expected_iou",
    "faithfulness",
    "feature_stats",
    "fvu",
    "linear_cka",
    "match_features",
    "num_threads",
    "odds_ratio",
    "set_num_threads",
    "top_samples",
    "topk_encode",
    "variance_gap",
]


def __getattr__(name: str) -> Any:
    if name not in _ROOM_OF:
        raise AttributeError(f"module 'microtome' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"microtome.{_ROOM_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)

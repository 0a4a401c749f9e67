"""One function per metric: thin, typed entrances to the compiled core. The arithmetic is in Rust."""

from microtome.metrics.analysis import Analysis, analyse
from microtome.metrics.cka import cka_matrix, linear_cka
from microtome.metrics.codes import RaggedCodes, SparseCodes
from microtome.metrics.encode import EncodeReport, TopKEncoder, topk_encode
from microtome.metrics.features import FeatureStats, feature_stats, l0, variance_gap
from microtome.metrics.odds import OddsRatio, odds_ratio
from microtome.metrics.reconstruction import fvu
from microtome.metrics.samples import SampleFires, sample_fires, top_samples

__all__ = [
    "Analysis",
    "EncodeReport",
    "FeatureStats",
    "OddsRatio",
    "RaggedCodes",
    "SampleFires",
    "SparseCodes",
    "TopKEncoder",
    "analyse",
    "cka_matrix",
    "feature_stats",
    "fvu",
    "l0",
    "linear_cka",
    "odds_ratio",
    "sample_fires",
    "top_samples",
    "topk_encode",
    "variance_gap",
]

"""One function per metric: thin, typed entrances to the compiled core. The arithmetic is in Rust."""

from microtome.metrics.analysis import Analysis, analyse
from microtome.metrics.circuit import (
    Bitset,
    IouChance,
    expected_iou,
    inclusion_rate,
    iou_chance,
    normalised_iou,
    top_n,
)
from microtome.metrics.cka import cka_matrix, linear_cka
from microtome.metrics.cka_variants import CkaInterval, cka_interval, minibatch_cka, rbf_cka
from microtome.metrics.codes import RaggedCodes, SparseCodes
from microtome.metrics.encode import EncodeReport, TopKEncoder, topk_encode
from microtome.metrics.features import FeatureStats, feature_stats, l0, variance_gap
from microtome.metrics.gap import FrequencyGap, frequency_gap
from microtome.metrics.odds import OddsRatio, odds_ratio
from microtome.metrics.reconstruction import fvu
from microtome.metrics.samples import SampleFires, sample_fires, top_samples
from microtome.metrics.similarity import (
    Matches,
    MutualMatches,
    decoder_cosine,
    match_features,
    mutual_matches,
)

__all__ = [
    "Analysis",
    "Bitset",
    "CkaInterval",
    "EncodeReport",
    "FeatureStats",
    "FrequencyGap",
    "IouChance",
    "Matches",
    "MutualMatches",
    "OddsRatio",
    "RaggedCodes",
    "SampleFires",
    "SparseCodes",
    "TopKEncoder",
    "analyse",
    "cka_interval",
    "cka_matrix",
    "decoder_cosine",
    "expected_iou",
    "feature_stats",
    "frequency_gap",
    "fvu",
    "inclusion_rate",
    "iou_chance",
    "l0",
    "linear_cka",
    "match_features",
    "minibatch_cka",
    "mutual_matches",
    "normalised_iou",
    "odds_ratio",
    "rbf_cka",
    "sample_fires",
    "top_n",
    "top_samples",
    "topk_encode",
    "variance_gap",
]

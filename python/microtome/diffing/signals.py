"""Signals per feature: variance gap, decoder cosine, firing frequencies and how they shift.

Source: 2602.08713, sections 5.1 and 6; the N-stage table follows Bricken et al., Stage-Wise Model Diffing (2024).
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl

from microtome.errors import ShapeError
from microtome.metrics import FeatureStats, SampleFires, decoder_cosine, odds_ratio, variance_gap

__all__ = ["cosine_table", "firing_shift", "signals"]


def signals(
    layer: int, base_decoder: Any, adapted_decoder: Any, vision: FeatureStats, text: FeatureStats
) -> pl.DataFrame:
    """The signals of one layer: one row per feature.

    Args:
        layer: number of the layer.
        base_decoder: ``W_dec`` (d_sae, d_in) of the language model's dictionary.
        adapted_decoder: ``W_dec`` (d_sae, d_in) of the dictionary adapted to the VLM, same feature order.
        vision: statistics of the codes on VLM runs (image and question).
        text: statistics of the codes on base-LM runs of the same prompts, images replaced by captions.

    Returns:
        Columns layer, feature, variance_gap, decoder_cosine (NaN for a zero decoder row), frequency_vision,
        frequency_text, dead (fires on neither side).

    Raises:
        ShapeError: the four do not have the same number of features.
    """
    cosine = np.asarray(decoder_cosine(base_decoder, adapted_decoder))
    sizes = {"decoders": len(cosine), "vision": vision.d_sae, "text": text.d_sae}
    if len(set(sizes.values())) != 1:
        raise ShapeError(f"signals: expected one number of features, found {sizes}")
    return pl.DataFrame(
        {
            "layer": np.full(len(cosine), layer, np.int64),
            "feature": np.arange(len(cosine), dtype=np.int64),
            "variance_gap": np.asarray(variance_gap(vision, text)),
            "decoder_cosine": cosine,
            "frequency_vision": vision.firing_frequency(),
            "frequency_text": text.firing_frequency(),
            "dead": vision.dead() & text.dead(),
        }
    )


def firing_shift(
    layer: int, spatial: FeatureStats | SampleFires, base: FeatureStats | SampleFires
) -> pl.DataFrame:
    """How firing changes from general to spatial questions: one row per feature.

    ``frequency_gap = p(spatial) - p(base)``; the odds ratio has 0.5 added to all four cells (Haldane-Anscombe).

    Args:
        layer: number of the layer.
        spatial: counts on the spatial questions: :class:`FeatureStats` per token, :class:`SampleFires` per sample.
        base: statistics on the general questions, counted the same way. Where the spatial questions are part of the
            general ones the two are nested; pass the complement for disjoint sets.

    Returns:
        Columns layer, feature, frequency_spatial, frequency_base, frequency_gap, odds_ratio, log_standard_error,
        p_value, q_value (Benjamini-Hochberg over the features of this table).

    Raises:
        DtypeError: one side counts tokens, the other samples.
        ShapeError: the sides differ in ``d_sae``.
    """
    odds = odds_ratio(spatial, base, counts="tokens" if isinstance(spatial, FeatureStats) else "samples")
    p_spatial, p_base = spatial.firing_frequency(), base.firing_frequency()
    return pl.DataFrame(
        {
            "layer": np.full(len(p_base), layer, np.int64),
            "feature": np.arange(len(p_base), dtype=np.int64),
            "frequency_spatial": p_spatial,
            "frequency_base": p_base,
            "frequency_gap": p_spatial - p_base,
            "odds_ratio": odds.odds_ratio,
            "log_standard_error": odds.log_standard_error,
            "p_value": odds.p_value,
            "q_value": odds.q_value(),
        }
    )


def cosine_table(
    stages: Mapping[str, Any], paths: Mapping[str, tuple[str, str]] | None = None
) -> pl.DataFrame:
    """Decoder cosines between stages, feature by feature.

    Fine-tuning along two orders, S to D to F (new data first) and S to M to F (new model first), tells what the model
    changed from what the data changed: a feature low in both columns is one that the new model itself rotated.

    Args:
        stages: name of a stage to its ``W_dec`` (d_sae, d_in), warm-started from one another so that features keep their index.
        paths: name of a column to the two stages it compares; all pairs of stages when None.

    Returns:
        Column feature, then one column of cosines per pair, named ``a->b`` or as in ``paths``.

    Raises:
        ShapeError: a stage that ``paths`` names is missing, or shapes differ.
    """
    pairs = dict(paths) if paths else {f"{a}->{b}": (a, b) for a, b in combinations(stages, 2)}
    columns: dict[str, npt.NDArray[np.float64]] = {}
    for name, (a, b) in pairs.items():
        if missing := [s for s in (a, b) if s not in stages]:
            raise ShapeError(f"paths: expected stages among {', '.join(stages)}, found {missing[0]}")
        columns[name] = np.asarray(decoder_cosine(stages[a], stages[b]))
    d_sae = len(next(iter(columns.values()))) if columns else 0
    return pl.DataFrame({"feature": np.arange(d_sae, dtype=np.int64), **columns})

"""The two-stage filter, the spatial filter and the neutral prompt, against planted truth."""

import math

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from microtome.diffing import neutral_survivors, select_adapted, select_spatial, sensitivity, summary
from microtome.diffing.study import DiffConfig
from microtome.errors import ShapeError


def features(n_layers=4, d_sae=250, seed=0):
    rng = np.random.default_rng(seed)
    n = n_layers * d_sae
    return pl.DataFrame(
        {
            "layer": np.repeat(np.arange(n_layers), d_sae),
            "feature": np.tile(np.arange(d_sae), n_layers),
            "variance_gap": rng.standard_normal(n),
            "decoder_cosine": rng.uniform(0.7, 1.0, n),
            "dead": np.zeros(n, bool),
        }
    )


def plant(table, keys):
    planted = pl.DataFrame(keys, schema=["layer", "feature"], orient="row").with_columns(
        planted=pl.lit(value=True)
    )
    return (
        table.join(planted, on=["layer", "feature"], how="left", maintain_order="left")
        .with_columns(pl.col("planted").fill_null(value=False))
        .with_columns(
            variance_gap=pl.when("planted").then(pl.col("variance_gap") + 10).otherwise("variance_gap"),
            decoder_cosine=pl.when("planted").then(0.2).otherwise("decoder_cosine"),
        )
    )


def test_planted_features_are_found_with_precision_and_recall_one():
    rng = np.random.default_rng(1)
    keys = [(int(i) // 250, int(i) % 250) for i in rng.choice(1000, 40, replace=False)]
    found = select_adapted(plant(features(), keys)).filter("adapted")
    assert set(found.select("layer", "feature").iter_rows()) == set(keys)


def naive(table, p_gap, p_cos):
    """The definition, row by row."""
    pool = [r for r in table.iter_rows(named=True) if not r["dead"] and math.isfinite(r["decoder_cosine"])]
    pool.sort(key=lambda r: (-r["variance_gap"], r["layer"], r["feature"]))
    pool = pool[: math.ceil(p_gap * len(pool))]
    pool.sort(key=lambda r: (r["decoder_cosine"], r["layer"], r["feature"]))
    return {(r["layer"], r["feature"]) for r in pool[: math.ceil(p_cos * len(pool))]}


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.floats(0.01, 1.0), st.floats(0.01, 1.0), st.booleans())
def test_filter_is_its_definition_also_with_ties_and_dead_features(seed, p_gap, p_cos, ties):
    rng = np.random.default_rng(seed)
    table = features(2, 30, seed).with_columns(dead=pl.Series(rng.random(60) < 0.3))
    if ties:
        table = table.with_columns(pl.col("variance_gap").round(0), pl.col("decoder_cosine").round(1))
    shuffled = table.sample(fraction=1.0, shuffle=True, seed=seed)
    found = select_adapted(shuffled, p_gap=p_gap, p_cos=p_cos).filter("adapted")
    assert set(found.select("layer", "feature").iter_rows()) == naive(table, p_gap, p_cos)


def test_adapted_set_is_four_percent_of_the_living_features():
    assert select_adapted(features()).filter("adapted").height == 40


def test_dead_features_and_undefined_cosines_are_never_selected():
    table = features().with_columns(
        dead=pl.col("feature") < 225,
        variance_gap=pl.when(pl.col("feature") < 225).then(100.0).otherwise("variance_gap"),
        decoder_cosine=pl.when(pl.col("feature") == 240).then(float("nan")).otherwise("decoder_cosine"),
    )
    found = select_adapted(table, p_gap=1.0, p_cos=1.0).filter("adapted")
    assert found.height == 4 * 24
    assert found["feature"].min() >= 225
    assert 240 not in found["feature"]


def test_order_of_rows_is_kept():
    table = features().sample(fraction=1.0, shuffle=True, seed=3)
    marked = select_adapted(table)
    assert marked.select("layer", "feature").equals(table.select("layer", "feature"))


def test_spatial_features_need_a_gap_an_odds_ratio_and_membership():
    table = features(1, 10).with_columns(
        frequency_gap=pl.Series([0.5, 0.4, 0.3, 0.2, 0.1, 0.0, -0.1, -0.2, -0.3, -0.4]),
        odds_ratio=pl.Series([5.0, 0.5, 3.0, 2.0, 2.0, 1.0, 0.5, 0.5, 0.5, 0.5]),
        adapted=pl.Series([True, True, False, True] + [False] * 6),
    )
    marked = select_spatial(table, top=0.4)
    assert marked.filter("spatial_candidate")["feature"].to_list() == [0, 2, 3]
    assert marked.filter("spatial")["feature"].to_list() == [0, 3]
    assert select_spatial(table, top=None, min_gap=0.4).filter("spatial")["feature"].to_list() == [0]
    with pytest.raises(ShapeError, match="exactly one"):
        select_spatial(table, top=0.2, min_gap=0.1)


def test_survivors_are_active_and_image_dominant_under_the_neutral_prompt():
    table = features(1, 4).with_columns(spatial=pl.Series([True, True, True, False]))
    neutral = pl.DataFrame(
        {
            "layer": [0] * 4,
            "feature": range(4),
            "sample_frequency": [0.5, 0.001, 0.5, 0.5],
            "image_mass": [0.9, 0.9, 0.4, 0.9],
        }
    )
    assert neutral_survivors(table, neutral)["survivor"].to_list() == [True, False, False, False]


def test_sensitivity_agrees_with_itself_at_the_reference():
    sweep = sensitivity(features())
    same = sweep.filter((pl.col("p_gap") == 0.2) & (pl.col("p_cos") == 0.2))
    assert same["iou_with_reference"].item() == 1.0
    assert sweep.height == 25
    with_candidates = sensitivity(features().with_columns(spatial_candidate=pl.col("feature") % 2 == 0))
    for row in with_candidates.iter_rows(named=True):
        kept = select_adapted(features(), p_gap=row["p_gap"], p_cos=row["p_cos"]).filter("adapted")
        assert row["n_spatial"] == (kept["feature"] % 2 == 0).sum()


def test_summary_counts_each_layer():
    table = summary(select_adapted(features()))
    assert table["features"].to_list() == [250] * 4
    assert table["adapted"].sum() == 40


@pytest.mark.parametrize("p", [0.0, -0.1, 1.1, float("nan")])
def test_shares_outside_the_unit_interval_are_refused(p):
    with pytest.raises(ShapeError, match="p_gap"):
        select_adapted(features(), p_gap=p)


def test_missing_columns_are_named():
    with pytest.raises(ShapeError, match="decoder_cosine"):
        select_adapted(features().drop("decoder_cosine"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"regimes": "text"}, "regimes: expected a tuple of at least one, found 'text'"),
        ({"regimes": ()}, "regimes: expected a tuple of at least one"),
        ({"adapt_steps": 0}, "adapt_steps: expected a whole number of at least 1, found 0"),
        ({"neighbours": 1.5}, "neighbours: expected a whole number"),
        ({"min_odds_ratio": math.nan}, r"min_odds_ratio: expected a number in \[0, inf\), found nan"),
        ({"max_q": -1.0}, r"max_q: expected a number in \[0, 1\], found -1.0"),
        ({"min_gap": math.nan}, r"min_gap: expected a number in \[-1, 1\], found nan"),
        ({"level": 1.0}, r"level: expected a number in \(0, 1\), found 1.0"),
        ({"match": "nope"}, "match: expected one of frequency_vision, frequency_text, .* found 'nope'"),
        ({"unit": "row"}, "unit: expected one of token, sample, found 'row'"),
    ],
)
def test_study_that_means_nothing_is_refused(change, message):
    with pytest.raises(ShapeError, match=message):
        DiffConfig(**change)

"""Spatial features against matched random ones: what is drawn, what is counted, what the interval says."""

import numpy as np
import polars as pl
import pytest
import torch

import microtome as mt
from diffing_cases import write_store
from microtome.diffing import against_controls, draw_controls
from microtome.diffing.counting import fires_by_label, labels_of, mean_square_by_sample
from microtome.errors import ShapeError

D = 12
SAE = mt.SAE(torch.eye(D), torch.eye(D), activation="topk", k=D)
"""Feature f is the f-th coordinate, where it is positive: what fires is what the rows say."""


def rows(n_samples, tokens, rates, seed):
    """Coordinates that fire at a rate of their sample's kind: (n_samples * tokens, D) of 0 and 1."""
    rng = np.random.default_rng(seed)
    own = np.repeat(rates, tokens, axis=0)
    return (rng.random((n_samples * tokens, D)) < own).astype(np.float32)


@pytest.fixture(scope="module")
def acts(tmp_path_factory):
    """400 images of 6 tokens, every third a relation question; features 0 and 1 fire on those thrice as often."""
    spatial = np.arange(400) % 3 == 0
    rates = np.full((400, D), 0.15)
    rates[:, :2] = np.where(spatial[:, None], 0.3, 0.1)
    x = rows(400, 6, rates, 0)
    path = tmp_path_factory.mktemp("controls") / "store"
    write_store(path, {"blocks.0.hook_resid_post": x}, tokens=6, columns={"spatial": spatial.tolist()})
    return mt.ActivationStore(path)["blocks.0.hook_resid_post"]


def table(acts):
    stats = mt.feature_stats(SAE.encode(acts))
    names = {"layer": [0] * D, "feature": range(D), "frequency_vision": stats.firing_frequency()}
    return pl.DataFrame({**names, "spatial": [True, True] + [False] * (D - 2), "dead": stats.dead()})


def test_controls_are_of_the_same_layer_nearest_in_frequency_living_and_not_chosen():
    rng = np.random.default_rng(0)
    features = pl.DataFrame(
        {
            "layer": np.repeat([0, 1], 50),
            "feature": np.tile(np.arange(50), 2),
            "frequency_vision": rng.uniform(0.01, 0.5, 100),
            "spatial": rng.random(100) < 0.1,
            "dead": rng.random(100) < 0.2,
        }
    )
    found = draw_controls(features, neighbours=5, n_draws=30)
    known = found.features.join(features, on=["layer", "feature"])
    free = features.filter(~pl.col("spatial") & ~pl.col("dead"))
    for i, place in enumerate(found.chosen):
        layer, _, p = found.features.row(place)
        nearest = (
            free.filter(pl.col("layer") == layer)
            .sort((pl.col("frequency_vision").log() - np.log(p)).abs())
            .head(5)["feature"]
            .to_list()
        )
        drawn = known[found.draws[:, i].tolist()]
        assert set(drawn["layer"]) == {layer}
        assert set(drawn["feature"]) <= set(nearest)
    assert not known[found.draws.ravel().tolist()]["spatial"].any()
    assert (found.draws == draw_controls(features, neighbours=5, n_draws=30).draws).all()
    assert len(set(map(tuple, found.draws.tolist()))) > 10, "drawn at random"


@pytest.mark.parametrize("unit", ["token", "sample"])
def test_comparison_is_its_definition(acts, unit):
    features = table(acts)
    found, each = against_controls(
        features, [(acts, SAE)], pl.col("spatial"), n_draws=200, neighbours=4, unit=unit
    )
    fired = acts.numpy().reshape(400, 6, D) > 0
    counted = fired.any(1)[:, None] if unit == "sample" else fired
    spatial = np.arange(400) % 3 == 0
    p = np.stack([counted[side].reshape(-1, D).mean(0) for side in (spatial, ~spatial)])
    controls = draw_controls(features, n_draws=200, neighbours=4)
    draws = controls.features["feature"].to_numpy()[controls.draws]
    for statistic, values in (("frequency", p[0]), ("gap", p[0] - p[1])):
        row = found.filter(pl.col("statistic") == statistic).row(0, named=True)
        assert row["chosen"] == pytest.approx(values[:2].mean(), rel=1e-5)
        assert row["controls"] == pytest.approx(values[draws].mean(), rel=1e-4)
        assert row["difference"] == pytest.approx(row["chosen"] - row["controls"])
        assert row["low"] < row["difference"] < row["high"]
    assert np.allclose(each["held_out_gap"], (p[0] - p[1])[:2], atol=1e-6)
    assert (found["images_spatial"][0], found["images_other"][0]) == (134, 266)


def test_planted_features_differ_from_controls_and_arbitrary_ones_do_not(acts):
    features = table(acts)
    planted, _ = against_controls(features, [(acts, SAE)], pl.col("spatial"), n_draws=300, neighbours=6)
    assert planted["low"].min() > 0.05
    assert planted["excludes_zero"].all()
    other = features.with_columns(spatial=pl.col("feature").is_in([6, 9])).filter(pl.col("feature") > 1)
    nothing, _ = against_controls(other, [(acts, SAE)], pl.col("spatial"), n_draws=300, neighbours=6)
    assert not nothing["excludes_zero"].any()


def test_interval_has_the_width_of_independent_images(acts):
    """Two features against one possible control each: the standard error of a difference of means over images."""
    features = table(acts).filter(pl.col("feature").is_in([0, 5]))
    features = features.with_columns(spatial=pl.col("feature") == 0)
    found, _ = against_controls(features, [(acts, SAE)], pl.col("spatial"), n_draws=2000, neighbours=1)
    x = (acts.numpy() > 0).reshape(400, 6, D).mean(1)[np.arange(400) % 3 == 0]
    expected = (x[:, 0] - x[:, 5]).std() / np.sqrt(len(x))
    row = found.filter(pl.col("statistic") == "frequency").row(0, named=True)
    assert (row["high"] - row["low"]) / 2 / 1.96 == pytest.approx(expected, rel=0.12)


def test_counts_by_label_and_by_sample_are_their_definitions(acts):
    labels = labels_of(acts, pl.when(pl.col("spatial")).then(pl.lit("a")).otherwise(pl.lit("b")).alias("x"))
    found = fires_by_label(acts, SAE, labels["x"])
    fired = (acts.numpy() > 0).reshape(400, 6, D)
    spatial = np.arange(400) % 3 == 0
    for name, side in (("a", spatial), ("b", ~spatial)):
        assert found[name].n_samples == side.sum()
        assert np.array_equal(found[name].fires, fired[side].any(1).sum(0))
    part = acts.where(pl.col("position") < 1 + pl.col("sample") % 4)
    values = acts.numpy().reshape(400, 6, D).astype(float)
    expected = np.mean([(values[i, : 1 + i % 4] ** 2).mean(0) for i in range(400)], axis=0)
    assert np.allclose(mean_square_by_sample(part, SAE), expected)


def test_labels_keep_the_order_of_rows_whatever_the_expression(acts):
    """A conditional selected lazily from a joined table may come back in another order; labels may not."""
    name = pl.when(pl.col("spatial")).then(pl.lit("yes")).otherwise(pl.lit("no")).alias("x")
    expected = np.repeat(np.where(np.arange(400) % 3 == 0, "yes", "no"), 6)
    assert labels_of(acts, name)["x"].to_list() == expected.tolist()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"level": 95}, "level: expected a number between 0 and 1, found 95"),
        ({"unit": "image"}, "unit: expected token or sample"),
        ({"chosen": "survivor"}, "found no survivor"),
        ({"neighbours": 0}, "neighbours"),
        ({"where": pl.col("spatial")}, "found 804 of relation questions, 0 others"),
    ],
)
def test_comparisons_that_cannot_be_made_are_refused(acts, change, message):
    with pytest.raises(ShapeError, match=message):
        against_controls(table(acts), [(acts, SAE)], pl.col("spatial"), **change)


def test_nothing_chosen_or_nothing_left_is_refused(acts):
    with pytest.raises(ShapeError, match="living features with spatial, found none"):
        draw_controls(table(acts).with_columns(spatial=pl.lit(value=False)))
    with pytest.raises(ShapeError, match="found all of them chosen"):
        draw_controls(table(acts).with_columns(spatial=pl.lit(value=True)))

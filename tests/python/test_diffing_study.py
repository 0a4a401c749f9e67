"""The diffing study: planted truth is found, signals are their definitions, the whole runs from two stores."""

import numpy as np
import polars as pl
import pytest

import microtome as mt
from diffing_cases import write_store
from microtome import organism
from microtome.dictionary import TrainConfig
from microtome.diffing import (
    cosine_table,
    firing_shift,
    select_adapted,
    signals,
    study,
)
from microtome.errors import ShapeError, UndefinedWarning
from microtome.evaluation import score
from microtome.metrics import SparseCodes
from microtome.record import read_record

D_SAE, D, N, K = 500, 32, 4000, 8


def codes(rng, preferred=()):
    """Random codes in which the preferred features fire more often and more strongly."""
    weights = np.ones(D_SAE)
    weights[list(preferred)] = 20.0
    draws = rng.random((N, D_SAE)) ** (1 / weights)
    indices = np.argsort(-draws, axis=1)[:, :K].astype(np.uint32)
    values = rng.gamma(2.0, 1.0, (N, K)) * np.where(np.isin(indices, list(preferred)), 3.0, 1.0)
    order = np.argsort(-values, axis=1)
    take = np.take_along_axis
    return SparseCodes(take(indices, order, 1), take(values, order, 1).astype(np.float32), D_SAE)


def test_planted_features_are_found_by_both_stages():
    rng = np.random.default_rng(0)
    tables, planted = [], set()
    for layer in range(3):
        chosen = rng.choice(D_SAE, 20, replace=False)
        base = rng.standard_normal((D_SAE, D)).astype(np.float32)
        adapted = base + 0.2 * rng.standard_normal((D_SAE, D)).astype(np.float32)
        adapted[chosen] = rng.standard_normal((20, D))  # rotated at random
        vision, text = (mt.feature_stats(codes(rng, p)) for p in (chosen, ()))
        tables.append(signals(layer, base, adapted, vision, text))
        planted |= {(layer, int(f)) for f in chosen}
    found = set(select_adapted(pl.concat(tables)).filter("adapted").select("layer", "feature").iter_rows())
    assert len(found & planted) / len(found) > 0.95  # precision
    assert len(found & planted) / len(planted) > 0.95  # recall


def test_signals_are_their_definitions():
    rng = np.random.default_rng(1)
    base, adapted = (rng.standard_normal((D_SAE, D)).astype(np.float32) for _ in range(2))
    a, b = codes(rng), codes(rng)
    table = signals(2, base, adapted, mt.feature_stats(a), mt.feature_stats(b))
    dense_a, dense_b = (np.asarray(c.to_dense(), np.float64) for c in (a, b))
    gap = (dense_a**2).mean(0) - (dense_b**2).mean(0)
    x, y = base.astype(np.float64), adapted.astype(np.float64)
    cosine = (x * y).sum(1) / np.linalg.norm(x, axis=1) / np.linalg.norm(y, axis=1)
    assert np.allclose(table["variance_gap"], gap, rtol=1e-10, atol=1e-12)
    assert np.allclose(table["decoder_cosine"], cosine, atol=1e-12)
    assert np.array_equal(table["frequency_vision"], (dense_a > 0).mean(0))
    assert table["layer"].unique().to_list() == [2]


def test_firing_shift_is_difference_and_smoothed_odds():
    rng = np.random.default_rng(2)
    a, b = mt.feature_stats(codes(rng, range(10))), mt.feature_stats(codes(rng))
    table = firing_shift(0, a, b)
    p, q = a.fires.astype(float), b.fires.astype(float)
    odds = (p + 0.5) * (N - q + 0.5) / ((q + 0.5) * (N - p + 0.5))
    assert np.allclose(table["odds_ratio"], odds)
    assert np.allclose(table["frequency_gap"], p / N - q / N)
    assert (table["q_value"].to_numpy()[:10] < 0.01).all()


def test_stages_are_compared_pair_by_pair():
    rng = np.random.default_rng(3)
    s, d = (rng.standard_normal((9, 4)).astype(np.float32) for _ in range(2))
    table = cosine_table({"S": s, "D": d, "F": s}, {"S->D": ("S", "D"), "S->F": ("S", "F")})
    assert np.allclose(table["S->F"], 1)
    assert np.allclose(table["S->D"], mt.decoder_cosine(s, d))
    assert cosine_table({"S": s, "D": d, "F": s}).columns == ["feature", "S->D", "S->F", "D->F"]
    with pytest.raises(ShapeError, match="found M"):
        cosine_table({"S": s}, {"x": ("S", "M")})


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    folder = tmp_path_factory.mktemp("diff")
    items = organism.dataset(56, seed=0)
    words = [item for item in items if item.form == "textual"]
    for which, asked in (("base_lm", words), ("vlm", items)):
        model = organism.load_model(which)
        hooks = ["blocks.[24].hook_resid_post"]
        with mt.capture(model, folder / which, hooks, processor=organism.load_processor()) as recorder:
            score(model, organism.load_processor(), asked, recorder=recorder, progress=False)
    return mt.ActivationStore(folder / "base_lm"), mt.ActivationStore(folder / "vlm"), folder


def test_study_runs_from_two_stores_to_one_table_and_continues(stores):
    base, vlm, folder = stores
    config = study.DiffConfig(
        train=TrainConfig(d_sae=64, k=4, steps=20, batch_size=128),
        spatial=pl.col("task") == "spatial",
        vision=pl.col("form") == "visual",
    )
    texts = dict(vlm.samples.select("id", "task").collect().iter_rows())
    result = study.run(base, vlm, folder / "out", config, neutral=vlm, texts=texts, progress=False)
    assert result.features.height == 2 * 64
    wanted = {
        "layer",
        "feature",
        "variance_gap",
        "decoder_cosine",
        "dead",
        "adapted",
        "spatial",
        "survivor",
        "label",
    }
    assert wanted <= set(result.features.columns)
    assert set(result.curves["regime"]) == {"base", "text", "image", "full", "random"}
    random = result.cosines.filter(pl.col("regime") == "random")["cosine"].abs().max()
    assert random < 0.3 < result.cosines.filter(pl.col("regime") == "text")["cosine"].min()
    again = study.run(base, vlm, folder / "out", config, neutral=vlm, texts=texts, progress=False)
    assert again.features.equals(result.features)
    made = read_record(folder / "out" / "tables" / "features.parquet")
    assert made.inputs == {str(store.path): store.fingerprint for store in (base, vlm)}
    assert made.parameters["p_gap"] == "0.2"


def trained_pair(folder, n):
    """Stores of the shipped pair, ``n`` questions a task: in words for the language model, in pictures for the VLM."""
    for which, form in (("base_lm", "textual"), ("vlm", "visual")):
        model, processor = organism.load_model(which), organism.load_processor()
        items = [item for task in organism.TASKS for item in organism.questions(task, form, n)]
        with mt.capture(model, folder / which, ["blocks.*.hook_resid_post"], processor=processor) as recorder:
            score(model, processor, items, recorder=recorder, progress=False)
    return mt.ActivationStore(folder / "base_lm"), mt.ActivationStore(folder / "vlm")


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_spatial_features_of_the_trained_pair_beat_matched_random_ones_on_unseen_images(tmp_path):
    """The claim of section 6 on the shipped pair; reported as it is found, in docs/diffing.md, at a larger size.

    With 60 questions a task and 256 features there are seven spatial features, too few to tell for the frequency.
    """
    told = TrainConfig(d_sae=512, k=8, steps=300, batch_size=1024)
    config = study.DiffConfig(train=told, regimes=("text",), spatial=pl.col("task") == "spatial")
    result = study.run(*trained_pair(tmp_path, 150), tmp_path / "out", config, progress=False)
    assert result.features["adapted"].sum() == pytest.approx(0.04 * (~result.features["dead"]).sum(), abs=3)
    table = result.controls.filter((pl.col("set") == "spatial") & (pl.col("tokens") == "all"))
    assert table.filter(pl.col("statistic") == "frequency")["low"].item() > 0
    assert table.filter(pl.col("statistic") == "gap")["low"].item() > 0


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_regimes_of_the_trained_pair_start_in_the_order_text_full_image(tmp_path):
    told = TrainConfig(d_sae=256, k=8, steps=150, batch_size=1024)
    config = study.DiffConfig(train=told, spatial=pl.col("task") == "spatial")
    result = study.run(*trained_pair(tmp_path, 60), tmp_path / "out", config, progress=False)
    curves = result.curves.filter(pl.col("tokens") == result.curves["tokens"].min())
    first = dict(curves.group_by("regime").agg(pl.col("fvu").mean()).iter_rows())
    assert first["text"] < first["full"] < first["image"], "text-only starts lowest"
    random = result.cosines.filter(pl.col("regime") == "random")["cosine"].abs().max()
    assert random < 0.05


def small_pair(folder):
    """Random rows at one hook: the base's text, the VLM's images and text; every third question is spatial."""
    hook, columns = "blocks.0.hook_resid_post", {"task": ["spatial", "other", "other"] * 20}
    draw = np.random.default_rng(0).normal
    base = write_store(folder / "base", {hook: draw(size=(240, 16))}, 4, columns)
    vlm = write_store(
        folder / "vlm", {hook: draw(size=(420, 16))}, 7, columns, kinds=["image"] * 3 + ["text"] * 4
    )
    return base, vlm


SMALL = {"train": TrainConfig(d_sae=64, k=6, steps=12, batch_size=64), "regimes": ("text",), "draws": 20}
ASKED = pl.col("task") == "spatial"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vision": pl.col("position") > 99}, "vision: expected rows of the VLM, found none by"),
        (
            {"vision": pl.col("kind") == "text", "gap_tokens": "image"},
            "gap_tokens: expected a kind among text",
        ),
        ({"spatial": pl.col("id") == "s0"}, "spatial: .* found no spatial ones (to choose by|held out) by"),
        ({"spatial": ASKED, "vision": ASKED}, "spatial: .* found no other ones by"),
    ],
)
def test_rows_that_leave_a_part_without_any_are_refused_before_any_work(change, message, tmp_path):
    base, vlm = small_pair(tmp_path)
    with pytest.raises(ShapeError, match=message):
        study.run(base, vlm, tmp_path / "out", study.DiffConfig(**SMALL, **change), progress=False)
    assert not (tmp_path / "out").exists()


def test_kind_of_token_without_both_questions_is_left_out_of_the_comparison(tmp_path):
    base, vlm = small_pair(tmp_path)
    config = study.DiffConfig(**SMALL, p_gap=1.0, p_cos=1.0, spatial=ASKED, vision=pl.col("kind") == "text")
    with pytest.warns(UndefinedWarning, match="comparison with random features is undefined .* for image"):
        result = study.run(base, vlm, tmp_path / "out", config, progress=False)
    assert result.controls["tokens"].unique().sort().to_list() == ["all", "text"]


def test_stores_without_a_common_hook_are_refused_with_both_sides(stores, tmp_path):
    base, _, _ = stores
    model = organism.load_model("base_lm")
    with mt.capture(model, tmp_path / "other", ["blocks.1.hook_mlp_out"]) as recorder:
        score(model, organism.load_processor(), organism.questions("colour", "textual", 2), recorder=recorder)
    with pytest.raises(ShapeError, match=r"blocks\.2\.hook_resid_post.*blocks\.1\.hook_mlp_out"):
        study.run(base, mt.ActivationStore(tmp_path / "other"), tmp_path / "out", progress=False)

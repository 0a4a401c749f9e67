"""Overlap: hand-computed IoU, the exact chance level, positions between forms, interchange, saved circuits."""

import json
import tracemalloc

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import microtome as mt
from circuit_cases import assert_same_state, pairs_of, state, tiny
from microtome.circuits import Circuit, CircuitShape, NodeScores, PositionMap, compare_circuits, interchange
from microtome.circuits.attribution.audit import completeness, exact_agreement
from microtome.circuits.attribution.blocks import Blocks, attribute_blocks, overlap_intervals, split_half
from microtome.circuits.circuit.overlap import normalised_iou
from microtome.circuits.faithfulness.nodes import patching_map
from microtome.circuits.interchange import interchange_table, random_subcircuit, swapped_circuit
from microtome.circuits.pairs.fingerprints import pairs_fingerprint, weights_fingerprint
from microtome.circuits.statistics import jackknife, rank_correlation
from microtome.errors import ShapeError

GROUPS = {"prefix": (0,), "data": (1, 2), "query": (3,), "generation": (4,)}


def of(heads, neurons, groups=GROUPS, slots=5):
    """Two layers, three heads, four neurons."""
    shape = CircuitShape(2, slots, 3, 4)
    masks = [np.zeros(shape.of(kind), bool) for kind in ("heads", "neurons")]
    for mask, nodes in zip(masks, (heads, neurons), strict=True):
        for node in nodes:
            mask[node] = True
    return Circuit.of_masks(*masks, groups)


def test_iou_averages_heads_and_neurons():
    a = of([(0, 1, 0), (1, 4, 2)], [(0, 3, 1)])
    b = of([(0, 1, 0)], [(0, 3, 1), (0, 3, 2), (1, 0, 0)])
    assert mt.circuit_iou(a, b, kind="heads") == 1 / 2
    assert mt.circuit_iou(a, b, kind="neurons") == 1 / 3
    assert mt.circuit_iou(a, b) == pytest.approx((1 / 2 + 1 / 3) / 2)
    assert mt.circuit_iou(a, b, group="generation", kind="heads") == 0
    assert mt.circuit_iou(a, b, group="query") == 1 / 2, "no heads in either: neurons alone"


def test_data_positions_are_dropped_before_they_are_compared():
    a, b = of([(0, 1, 0), (1, 1, 2)], []), of([(0, 2, 0)], [])
    assert mt.circuit_iou(a, b, group="data") == 1 / 2
    assert mt.circuit_iou(a, b, group="data", position_free=False) == 0
    assert mt.circuit_iou(a, b) == 0


def test_two_empty_circuits_overlap_fully():
    """IoU(empty, empty) = 1 by definition, and chance is 1 there, so nIoU is undefined."""
    nothing = of([], [])
    assert mt.circuit_iou(nothing, nothing) == 1
    assert np.isnan(mt.circuit_niou(nothing, nothing))


@given(st.integers(1, 9), st.integers(0, 9), st.integers(0, 9))
def test_chance_level_is_the_mean_over_all_sets(n, a, b):
    from itertools import combinations

    a, b = min(a, n), min(b, n)
    first = set(range(a))
    ious = [
        len(first & set(c)) / len(first | set(c)) if first | set(c) else 1.0
        for c in combinations(range(n), b)
    ]
    assert mt.expected_iou(n, a, b) == pytest.approx(np.mean(ious), abs=1e-12)


def test_chance_level_of_large_circuits_approaches_the_ratio_of_rates():
    n, alpha, beta = 100_000_000, 0.07, 0.15
    expected = alpha * beta / (alpha + beta - alpha * beta)
    assert mt.expected_iou(n, int(alpha * n), int(beta * n)) == pytest.approx(expected, rel=1e-5)


def test_niou_is_the_excess_over_chance_not_the_notebooks_formula():
    """Trap 2: (a - b) / (1 - b), where the notebook computes a - 2 b clamped at 0.01."""
    assert normalised_iou(0.5, 0.2) == pytest.approx(0.375)
    assert normalised_iou(0.5, 0.2, "notebook") == pytest.approx(0.1)
    assert normalised_iou(0.3, 0.2, "notebook") == 0.01
    a, b = of([(0, 1, 0)], [(0, 0, 0)]), of([(1, 1, 0)], [(0, 0, 1)])
    assert mt.circuit_niou(a, b) < 0
    assert mt.circuit_niou(a, a) == 1


def test_drawn_chance_agrees_with_the_exact_one():
    rng = np.random.default_rng(0)
    masks = [(rng.random((4, 6, 8)) < 0.2, rng.random((4, 6, 40)) < 0.2) for _ in range(2)]
    a, b = (Circuit.of_masks(*m, {"query": tuple(range(6))}) for m in masks)
    drawn, exact = (mt.circuit_niou(a, b, chance=c, n_draws=200) for c in ("draws", "exact"))
    assert abs(drawn - exact) < 0.02
    assert abs(exact) < 0.06


def test_forms_of_unequal_length_compare_through_the_position_map():
    text = {"prefix": (0,), "data": (1, 2, 3), "query": (4, 5), "generation": (6,)}
    a = of([(0, 4, 1), (0, 5, 1), (1, 6, 0)], [], text, slots=7)
    b = of([(0, 3, 1), (1, 4, 0)], [])
    assert mt.circuit_iou(a, b, group="generation") == 1
    assert mt.circuit_iou(a, b, group="query") == 1, "both query words of the text go to the one of the image"
    back = PositionMap.between(text, GROUPS).apply(a)
    assert set(back) == {("head", 0, 3, 1), ("head", 1, 4, 0)}
    with pytest.raises(ShapeError, match="without groups"):
        mt.circuit_iou(Circuit.empty(CircuitShape(1, 2, 3, 4)), Circuit.empty(CircuitShape(1, 3, 3, 4)))
    with pytest.raises(ShapeError, match="one model"):
        mt.circuit_iou(a, Circuit.empty(CircuitShape(1, 2, 3, 4)))


def test_position_map_leaves_no_query_position_out():
    for n, m in ((3, 5), (5, 3), (4, 4), (1, 6)):
        a = {"query": tuple(range(n)), "generation": (n,)}
        b = {"query": tuple(range(m)), "generation": (m,)}
        pairs = PositionMap.between(a, b).pairs
        assert pairs.any(0).all()
        assert pairs.any(1).all()
        assert n != m or np.array_equal(pairs, np.eye(n + 1, dtype=bool))


def test_interchange_swaps_one_group_and_keeps_the_others():
    a = of([(0, 1, 0), (0, 3, 0), (1, 4, 2)], [(0, 3, 1)])
    b = of([(1, 2, 1), (1, 3, 2), (0, 4, 0)], [(1, 4, 3)])
    assert set(swapped_circuit(a, b, ["query"])) == {("head", 0, 1, 0), ("head", 1, 3, 2), ("head", 1, 4, 2)}
    data = swapped_circuit(a, b, ["data"])
    assert {n for n in data if n[2] in (1, 2)} == {("head", 1, 1, 1), ("head", 1, 2, 1)}, "data go everywhere"


@given(st.integers(0, 1000))
@settings(max_examples=30)
def test_random_subcircuits_stay_inside_their_group_and_model(seed):
    """Trap 3: no draw falls out of range, so every draw has the size that was asked for."""
    a = of([(0, 1, 0), (0, 3, 0), (1, 4, 2)], [(0, 3, 1)])
    drawn = random_subcircuit(a, "data", 5, 6, seed)
    inside = drawn.group("data")
    assert (inside.size("heads"), inside.size("neurons")) == (5, 6)
    assert drawn - inside == a - a.group("data")


def test_interchange_with_the_same_circuit_is_as_good_as_the_original():
    built = tiny("llava")
    pairs = pairs_of(built, 3)
    circuit = mt.attribute(built.model, pairs).circuit(0.1)
    before = state(built.model)
    found = interchange(built.model, (pairs, pairs), (circuit, circuit), ["query", "generation"], n_random=3)
    assert_same_state(before, state(built.model))
    assert found["query"].normalised == pytest.approx(1)
    assert found["generation"].random[0].shape == (3, 3)
    table = interchange_table(found, ("image", "text"))
    assert table["group"].to_list() == ["query", "generation"]
    assert table["image_original"].to_list() == pytest.approx(table["image_swapped"].to_list())


def test_interchange_is_normalised_between_random_and_original():
    from microtome.circuits.interchange import Interchange

    sides = np.array([1.0, 1.0]), np.array([0.8, 0.8]), np.array([[0.2, 0.2], [0.4, 0.4]])
    one = Interchange("query", *((x, x) for x in sides))
    assert one.normalised == pytest.approx((0.8 - 0.3) / (1 - 0.3))
    low, high = one.interval(200)
    assert low <= one.normalised <= high
    same = Interchange("query", *((x, x) for x in (sides[0], sides[0], sides[0][None])))
    assert np.isnan([same.normalised, *same.interval(20)]).all(), "nothing to tell apart"


def test_interchange_between_an_image_and_a_text_of_other_length():
    built = tiny("llava")
    image = pairs_of(built, 2)
    text = pairs_of(built, 2, image=False, words=9)
    groups = {"prefix": (0,), "data": (1, 2), "query": (3, 4, 5, 6, 7, 8), "generation": (9,)}
    scores = mt.attribute(built.model, text, "plain")
    scores = NodeScores(scores.heads, scores.neurons, 2, groups=groups)
    circuits = mt.attribute(built.model, image, "plain").circuit(0.2), scores.circuit(0.2)
    found = interchange(built.model, (image, text), circuits, ["data", "query"], n_random=2)
    assert np.isfinite(found["data"].normalised)
    table = compare_circuits(*circuits, n_draws=5)
    assert table["group"].unique().sort().to_list() == ["all", "data", "generation", "prefix", "query"]
    assert table.filter(pl.col("p") > 1).height == 0


def test_circuits_survive_saving(tmp_path):
    a = of([(0, 1, 0), (1, 4, 2)], [(0, 3, 1)])
    a.save(tmp_path / "a.parquet")
    b = Circuit.load(tmp_path / "a.parquet")
    assert a == b
    assert b.groups == GROUPS
    assert pl.read_parquet(tmp_path / "a.parquet")["layer"].to_list() == [0, 1, 0]
    pl.DataFrame({"x": [1]}).write_parquet(tmp_path / "other.parquet")
    with pytest.raises(ShapeError, match=r"written by Circuit\.save"):
        Circuit.load(tmp_path / "other.parquet")


def scored(heads, neurons, **rest):
    return NodeScores(np.asarray(heads, np.float32), np.asarray(neurons, np.float32), 1, **rest)


def test_selection_takes_whole_numbers_of_each_kind_ties_by_position():
    scores = scored([[[1, 2], [2, 0]]], [[[5, 5, 5], [5, 5, np.nan]]])
    chosen = scores.circuit(0.5)
    assert list(chosen) == [("head", 0, 0, 1), ("head", 0, 1, 0), *(("neuron", 0, 0, i) for i in range(3))]
    assert len(scores.circuit(0)) == 0
    assert len(scores.circuit(1)) == 10
    assert scores.circuit(0.25, 0.5).size("heads") == 1
    assert list(scores.circuit(0.2, joint=True)) == [("neuron", 0, 0, 0), ("neuron", 0, 0, 1)]
    with pytest.raises(ShapeError, match="size: expected a share"):
        scores.circuit(7)
    with pytest.raises(ShapeError, match="by: expected 'absolute'"):
        scores.circuit(0.1, by="signed")


def test_signed_scores_rank_by_magnitude_or_by_value():
    scores = scored([[[-3, 2]]], [[[-1, 1]]], signed=True)
    assert ("head", 0, 0, 0) in scores.circuit(0.5)
    assert ("head", 0, 0, 1) in scores.circuit(0.5, by="signed")


@given(st.lists(st.sampled_from([0.0, 1.0, 2.0, float("nan")]), min_size=1, max_size=40), st.integers(0, 40))
def test_selection_is_a_stable_sort(values, n):
    n = min(n, len(values))
    scores = scored([[[0.0]]], [[values]])
    order = sorted(range(len(values)), key=lambda i: (-values[i] if values[i] == values[i] else np.inf, i))
    chosen = scores.circuit(0.0, (n + 0.5) / len(values) if n < len(values) else 1.0)
    assert {index for _, _, _, index in chosen} == set(order[:n])


def test_scores_merge_to_the_mean_of_all_pairs(tmp_path):
    built = tiny("llava")
    pairs = pairs_of(built, 3)
    whole = mt.attribute(built.model, pairs)
    merged = mt.attribute(built.model, pairs[:1]).merge(mt.attribute(built.model, pairs[1:]))
    np.testing.assert_allclose(merged.neurons, whole.neurons, atol=1e-7)
    merged.save(tmp_path / "scores")
    assert json.loads((tmp_path / "scores" / "scores.json").read_text())["n_pairs"] == 3


def test_scores_of_no_pair_count_nothing():
    some = NodeScores(
        np.ones((1, 2, 3), np.float32), np.full((1, 2, 4), 2, np.float32), 2, facts={"pairs": "a"}
    )
    none = NodeScores(np.full((1, 2, 3), np.nan), np.full((1, 2, 4), np.nan), 0, 1, facts={"pairs": "b"})
    for merged in (some.merge(none), none.merge(some)):
        assert (merged.n_pairs, merged.n_skipped) == (2, 1)
        np.testing.assert_array_equal(merged.heads, some.heads)
        assert merged.facts["pairs"] not in ("a", "b")
    assert np.isnan(none.merge(none).neurons).all()


def test_effect_map_sums_all_scores_of_a_place():
    scores = scored([[[1, 2], [3, 4]]], [[[1], [np.nan]]])
    assert scores.effect_map().tolist() == [[4, 7]]


def test_patching_map_measures_what_the_effect_map_approximates():
    built = tiny("llama")
    pairs = pairs_of(built, 2, image=False)
    measured = patching_map(built.model, pairs)
    assert measured.shape == (3, pairs.n_slots)
    assert not measured[:, : pairs.n_slots - 3].any()
    approximate = mt.attribute(built.model, pairs).effect_map()
    assert rank_correlation(measured.ravel(), approximate.ravel()) > 0.8


def test_path_integral_is_complete():
    for family in ("llava", "qwen3_vl"):
        built = tiny(family)
        pairs = pairs_of(built, 2)
        assert completeness(built.model, pairs, 40).error < 0.02
        assert completeness(built.model, pairs, 1).error > completeness(built.model, pairs, 40).error


def test_scores_agree_with_exact_patching_on_the_top_nodes():
    built = tiny("llava")
    pairs = pairs_of(built, 2)
    table = exact_agreement(built.model, pairs, mt.attribute(built.model, pairs), 60)
    assert table.height == 120
    for kind in ("head", "neuron"):
        of_kind = table.filter(pl.col("kind") == kind)
        assert rank_correlation(of_kind["score"], of_kind["exact"]) > 0.8


def test_blocks_add_up_to_the_attribution_of_all_pairs():
    built = tiny("llava")
    pairs = pairs_of(built, 5)
    blocks = attribute_blocks(built.model, pairs, 3)
    assert [part.n_pairs for part in blocks.parts] == [2, 2, 1]
    whole, added = mt.attribute(built.model, pairs), blocks.scores()
    np.testing.assert_allclose(added.heads, whole.heads, atol=1e-6)
    np.testing.assert_allclose(added.neurons, whole.neurons, atol=1e-6)
    np.testing.assert_allclose(
        blocks.scores([0, 2]).heads, mt.attribute(built.model, pairs[[0, 1, 4]]).heads, atol=1e-6
    )
    assert added.facts["pairs"] == whole.facts["pairs"]
    assert blocks.scores([0, 2]).facts["pairs"] not in {whole.facts["pairs"], *added.facts["blocks"]}
    assert added.facts["weights"] == whole.facts["weights"]
    with pytest.raises(ShapeError, match="at least one"):
        blocks.scores([])
    with pytest.raises(ShapeError, match="n_blocks: expected 1 or more"):
        attribute_blocks(built.model, pairs, 0)


def test_split_half_gives_the_noise_floor_per_group():
    built = tiny("llava")
    table = split_half(built.model, pairs_of(built, 4), 0.1, n_splits=2, method="plain")
    assert table.columns == ["split", "group", "iou", "chance", "niou"]
    assert table.filter(pl.col("group") == "all")["iou"].is_between(0.01, 1).all()
    assert table["split"].n_unique() == 2


def test_mean_over_blocks_holds_little_beside_its_result():
    rng = np.random.default_rng(0)
    shapes = (32, 8, 4), (32, 8, 1000)
    parts = [NodeScores(*(rng.random(s, np.float32) for s in shapes), n_pairs=i + 1) for i in range(4)]
    empty = NodeScores(*(np.full(s, np.nan, np.float32) for s in shapes), n_pairs=0, n_skipped=5)
    tracemalloc.start()
    mean = Blocks((*parts, empty)).scores()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    for kind in ("heads", "neurons"):
        whole = sum(part.n_pairs * getattr(part, kind).astype(np.float64) for part in parts) / 10
        np.testing.assert_allclose(getattr(mean, kind), whole, rtol=1e-6)
    assert peak < 1.5 * (mean.heads.nbytes + mean.neurons.nbytes)
    assert (mean.n_pairs, mean.n_skipped) == (10, 5)
    assert np.isnan(Blocks((empty, empty)).scores().neurons).all(), "no pair, no mean"


def planted(rng, spread, n=8):
    """Blocks of scores around one mean: nodes rank alike where ``spread`` is small."""
    mean = rng.random((2, 5, 4)), rng.random((2, 5, 40))
    noisy = [[m + spread * rng.standard_normal(m.shape) for m in mean] for _ in range(n)]
    return Blocks(
        tuple(NodeScores(*(x.astype(np.float32) for x in part), 3, groups=GROUPS) for part in noisy)
    )


def test_intervals_of_the_overlap_are_as_wide_as_the_blocks_disagree():
    widths = []
    for spread in (0.0, 0.05, 0.5):
        rng = np.random.default_rng(0)
        table = overlap_intervals(planted(rng, spread), planted(rng, spread), (0.3, 0.2))
        row = table.row(by_predicate=pl.col("group") == "query", named=True)
        assert row["niou_low"] <= row["niou"] <= row["niou_high"]
        widths.append(row["niou_high"] - row["niou_low"])
    assert widths[0] == 0 < widths[1] < widths[2]


def test_jackknife_follows_its_definition():
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal(8), rng.standard_normal(6)
    value = float(x.mean() * y.mean())
    left_x = [float(np.delete(x, i).mean() * y.mean()) for i in range(8)]
    left_y = [float(x.mean() * np.delete(y, i).mean()) for i in range(6)]
    variance = sum((len(v) - 1) / len(v) * sum((a - np.mean(v)) ** 2 for a in v) for v in (left_x, left_y))
    found = jackknife(value, left_x, left_y)
    assert found.high - value == pytest.approx(2.5706 * variance**0.5, rel=3e-3), "t of 5 degrees of freedom"
    with pytest.raises(ShapeError, match="at least 2 blocks"):
        jackknife(1.0, [1.0])


def test_circuit_keeps_what_made_it(tmp_path):
    """P26: weights, pairs, method, steps, dtype, version and size lie in the file, and come back."""
    built = tiny("llava")
    pairs = pairs_of(built, 2)
    circuit = mt.attribute(built.model, pairs, steps=3).circuit(0.1)
    circuit.save(tmp_path / "a.parquet")
    facts = Circuit.load(tmp_path / "a.parquet").facts
    assert facts == circuit.facts
    assert facts["weights"] == weights_fingerprint(built.model)
    assert facts["pairs"] == pairs_fingerprint(pairs) != pairs_fingerprint(pairs[:1])
    assert (facts["method"], facts["steps"], facts["dtype"], facts["size"]) == ("ig", 3, "float32", 0.1)
    assert facts["version"] == mt.__version__
    assert circuit.group("query").facts == (circuit | circuit).facts == facts


def test_circuits_of_other_weights_compare_only_when_told():
    built, other = tiny("llava"), tiny("llava", 1)
    pairs = pairs_of(built, 2)
    a, b = (mt.attribute(x.model, pairs, "plain").circuit(0.1) for x in (built, other))
    for compare in (mt.circuit_iou, mt.circuit_niou, compare_circuits):
        with pytest.raises(ShapeError, match="expected circuits of the same weights"):
            compare(a, b)
    assert 0 <= mt.circuit_iou(a, b, across_models=True) < 1
    assert compare_circuits(a, b, n_draws=2, across_models=True).height > 0
    with pytest.raises(ShapeError, match="same weights"):
        interchange(built.model, (pairs, pairs), (a, b), ["query"], n_random=1)


def test_fingerprint_changes_with_one_weight_two_rows_and_the_dtype():
    import torch

    layer = torch.nn.Linear(8, 8)
    seen = {weights_fingerprint(layer)}
    with torch.no_grad():
        layer.weight[3, 4] = torch.nextafter(layer.weight[3, 4], torch.tensor(9.0))
        seen.add(weights_fingerprint(layer))
        layer.weight[[0, 1]] = layer.weight[[1, 0]]
        seen.add(weights_fingerprint(layer))
        layer.weight[:, [0, 1]] = layer.weight[:, [1, 0]]
        seen.add(weights_fingerprint(layer))
    assert len(seen) == 4
    assert weights_fingerprint(layer) == weights_fingerprint(layer)
    assert weights_fingerprint(layer.bfloat16()) not in seen


def test_chance_of_the_data_group_is_that_of_sets_without_positions():
    """Every pair of random circuits enumerated by drawing: exact for the compared sizes, drawn before positions go."""
    rng = np.random.default_rng(0)
    shape = CircuitShape(2, 5, 3, 4)
    a, b = (Circuit.random(shape, 8, 12, seed=s, groups=GROUPS) for s in (1, 2))
    x, y = a.without_positions("data"), b.without_positions("data")
    n = 2 * 3
    ious = []
    for _ in range(4000):
        p, q = (set(rng.choice(n, c.size("heads"), replace=False)) for c in (x, y))
        ious.append(len(p & q) / len(p | q) if p | q else 1.0)
    row = compare_circuits(a, b, n_draws=300).row(
        by_predicate=(pl.col("group") == "data") & (pl.col("kind") == "heads"), named=True
    )
    assert row["chance"] == pytest.approx(np.mean(ious), abs=4 * np.std(ious) / 4000**0.5)
    drawn = []
    for _ in range(4000):
        sides = []
        for c in (a, b):
            mask = np.zeros((2, 2, 3), bool)
            mask.reshape(-1)[rng.choice(12, c.group("data").size("heads"), replace=False)] = True
            sides.append(mask.any(1))
        drawn.append((sides[0] & sides[1]).sum() / max((sides[0] | sides[1]).sum(), 1))
    assert row["drawn_mean"] == pytest.approx(np.mean(drawn), abs=4 * np.std(drawn) / 300**0.5)


@pytest.mark.slow
def test_selection_among_a_hundred_million_scores():
    rng = np.random.default_rng(0)
    neurons = rng.random((10, 1000, 10_000), np.float32)
    scores = scored(rng.random((10, 1000, 8), np.float32), neurons)
    circuit = scores.circuit(0.07)
    assert circuit.size("neurons") == 7_000_000
    least, most = 2.0, 0.0
    for layer in range(10):
        mask = circuit.layer_mask("neurons", layer)
        least, most = min(least, neurons[layer][mask].min()), max(most, neurons[layer][~mask].max())
    assert least >= most

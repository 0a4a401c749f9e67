"""Sets of nodes against Python sets and NumPy; the chance level against enumeration and simulation."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import microtome as mt
from microtome.errors import DtypeError, ShapeError
from microtome.metrics import Bitset, inclusion_rate, iou_chance, normalised_iou, top_n


def enumerated(n, a, b):
    """IoU of every pair of circuits: mean, variance and the sizes of all intersections."""
    shared = [
        len(set(x) & set(y))
        for x in itertools.combinations(range(n), a)
        for y in itertools.combinations(range(n), b)
    ]
    ious = np.array([i / (a + b - i) if a + b else 1.0 for i in shared])
    return ious.mean(), ious.var(), np.array(shared)


@pytest.mark.parametrize(
    ("n", "a", "b"), [(6, 6, 2), (6, 3, 2), (7, 4, 5), (9, 2, 6), (5, 0, 0), (5, 0, 3), (12, 3, 4)]
)
def test_chance_level_is_that_of_all_pairs_of_circuits(n, a, b):
    mean, variance, shared = enumerated(n, a, b)
    for seen in range(min(a, b) + 1):
        found = iou_chance(n, a, b, seen)
        assert found == pytest.approx((mean, variance, (shared >= seen).mean()), abs=1e-12)
    assert mt.expected_iou(n, a, b) == found.mean


def test_strata_are_drawn_independently():
    rng = np.random.default_rng(0)
    n, a, b = [40, 100, 10], [5, 60, 0], [20, 10, 3]
    ious = []
    for _ in range(4000):
        shared = sum(
            len(np.intersect1d(rng.choice(m, p, False), rng.choice(m, q, False)))
            for m, p, q in zip(n, a, b, strict=True)
        )
        ious.append(shared / (sum(a) + sum(b) - shared))
    found = iou_chance(n, a, b)
    assert abs(found.mean - np.mean(ious)) < 4 * np.std(ious) / math.sqrt(4000)
    assert found.variance == pytest.approx(np.var(ious), rel=0.15)
    assert iou_chance([30], [4], [9]) == pytest.approx(iou_chance(30, 4, 9), nan_ok=True)


def test_a_large_circuit_has_the_limit_of_inclusion_rates():
    assert mt.expected_iou(10**8, 7 * 10**6, 15 * 10**6) == pytest.approx(
        0.07 * 0.15 / (0.22 - 0.07 * 0.15), abs=1e-7
    )


def test_nan_is_returned_only_where_nothing_is_defined():
    assert math.isnan(iou_chance(10, 3, 4).p_value)
    assert math.isnan(normalised_iou(1.0, 1.0))
    assert normalised_iou(0.1, 0.4) == pytest.approx(-0.5)


def test_inclusion_rate_is_the_share_of_circuits_that_touch_a_node():
    circuits = list(itertools.combinations(range(9), 3))
    assert inclusion_rate(9, 3, 4) == pytest.approx(np.mean([min(c) < 4 for c in circuits]), abs=1e-14)
    assert inclusion_rate(10**6, 70_000) == pytest.approx(0.07, rel=1e-12)


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 300).flatmap(lambda n: st.tuples(st.just(n), *[st.sets(st.integers(0, n - 1))] * 2)))
def test_bitsets_are_sets(case):
    n, x, y = case
    a, b = Bitset.from_indices(sorted(x), n), Bitset.from_indices(list(y), n)
    assert set((a & b).to_indices()) == x & y
    assert set((a | b).to_indices()) == x | y
    assert set((a - b).to_indices()) == x - y
    assert a.overlap(b) == (len(x & y), len(x | y))
    assert a.iou(b) == (len(x & y) / len(x | y) if x | y else 1.0)
    assert len(a) == len(x)
    assert Bitset.from_mask(a.to_mask()) == a
    assert all(node in a for node in x)
    assert -1 not in a
    assert n not in a


def test_niou_is_zero_on_average_over_random_circuits():
    rng = np.random.default_rng(0)
    sets = [Bitset.from_indices(rng.choice(200, 30, False), 200) for _ in range(80)]
    values = [a.niou(b) for a, b in itertools.combinations(sets, 2)]
    assert abs(np.mean(values)) < 0.01
    assert sets[0].niou(sets[0]) == 1


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.sampled_from([0.0, -0.0, 1.0, 0.5, -2.0, np.inf, -np.inf, np.nan, 1e-42]), min_size=1, max_size=120
    ),
    st.floats(0, 1),
)
def test_top_n_sorts_by_score_then_node(scores, share):
    scores, n = np.array(scores, np.float32), int(share * len(scores))
    order = sorted(range(len(scores)), key=lambda i: (-(scores[i] if scores[i] == scores[i] else -np.inf), i))
    assert top_n(scores, n).tolist() == sorted(order[:n])


def test_top_n_of_a_million_scores_of_each_dtype():
    scores = torch.from_numpy(np.random.default_rng(0).standard_normal((10, 100_000), dtype=np.float32))
    for values in (scores, scores.bfloat16(), scores.half()):
        flat = values.float().numpy().ravel()
        chosen = top_n(values, 70_000)
        assert np.array_equal(chosen, np.sort(np.lexsort((np.arange(flat.size), -flat))[:70_000]))


def test_results_are_the_same_for_any_number_of_threads():
    scores = np.random.default_rng(0).integers(0, 50, 3_000_000).astype(np.float32)
    threads = mt.num_threads()
    try:
        results = set()
        for n in (1, 2, 3, 7, 16):
            mt.set_num_threads(n)
            chosen = top_n(scores, 200_000)
            results.add((chosen.tobytes(), len(Bitset.from_indices(chosen, scores.size))))
    finally:
        mt.set_num_threads(threads)
    assert len(results) == 1


def test_sizes_beyond_memory_are_refused_by_name():
    with pytest.raises(MemoryError, match="a set among 1125899906842624 nodes needs 140737488355328 bytes"):
        Bitset.from_indices([0], 2**50)
    with pytest.raises(ShapeError, match="size_a: expected at most 1099511627776 nodes, or all but as many"):
        mt.expected_iou(2**63 - 1, 2**62, 2**62)
    assert mt.expected_iou(2**62, 100, 2**62 - 100) == pytest.approx(100 / 2**62, abs=1e-18)


def test_bad_input_is_refused_by_name():
    with pytest.raises(ShapeError, match="size_a: expected at most n = 5, found 6"):
        mt.expected_iou(5, 6, 1)
    with pytest.raises(ShapeError, match="size_b: expected a whole number of at least 0, found -1"):
        mt.expected_iou(5, 2, -1)
    with pytest.raises(ShapeError, match="one size for each of 2 strata"):
        mt.expected_iou([5, 5], [1, 1], [1])
    with pytest.raises(ShapeError, match="n: expected at least one stratum"):
        mt.expected_iou([], [], [])
    with pytest.raises(ShapeError, match=r"indices: expected nodes in 0\.\.10, found 10"):
        Bitset.from_indices([10], 10)
    with pytest.raises(ShapeError, match="indices: expected whole numbers"):
        Bitset.from_indices([0.5], 10)
    with pytest.raises(DtypeError, match="mask: expected bool, found int64"):
        Bitset.from_mask(np.arange(3))
    with pytest.raises(ShapeError, match="other: expected 10 nodes, found 11"):
        Bitset.from_indices([1], 10).iou(Bitset.from_indices([1], 11))
    with pytest.raises(ShapeError, match="n: expected at most 3, the number of scores, found 4"):
        top_n(np.zeros(3, np.float32), 4)
    with pytest.raises(DtypeError, match="scores: expected float32"):
        top_n(np.zeros(3), 1)

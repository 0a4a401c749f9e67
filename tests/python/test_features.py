"""Feature statistics, odds ratios, top samples: their definitions, in any order and on any threads."""

from __future__ import annotations

import doctest
import math
from importlib import import_module
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import microtome as mt
from microtome import metrics
from microtome.errors import DtypeError, NonFiniteError, ShapeError
from microtome.metrics import RaggedCodes, SampleFires, SparseCodes

FIELDS = ("fires", "sum", "sum_sq", "max")


def random_codes(seed=0, n=300, k=5, d_sae=37, fill=0.8):
    """Codes with k distinct features per row, some slots unfilled."""
    rng = np.random.default_rng(seed)
    indices = np.argsort(rng.random((n, d_sae)), 1)[:, :k].astype(np.uint32)
    values = np.exp(rng.standard_normal((n, k))).astype(np.float32)
    values[rng.random((n, k)) > fill] = 0
    return SparseCodes(indices, values, d_sae)


def definition(dense):
    """Σ over rows of 1{h > 0}, h, h² and the maximum, in float64."""
    h = dense.astype(np.float64)  # (n, d_sae)
    return {"fires": (h > 0).sum(0), "sum": h.sum(0), "sum_sq": (h * h).sum(0), "max": h.max(0)}


def assert_same(stats, expected):
    for field in FIELDS:
        np.testing.assert_allclose(getattr(stats, field), expected[field], rtol=1e-12, err_msg=field)


def top_definition(dense, samples, positions, n, per_sample=True):
    """Sort all firing tokens of a feature by (-h, sample, position); keep a sample's first."""
    table = []
    for f in range(dense.shape[1]):
        hits = sorted(
            (-h, s, p) for h, s, p in zip(dense[:, f].tolist(), samples, positions, strict=True) if h > 0
        )
        seen, rank = set(), 0
        for h, s, p in hits:
            if rank < n and not (per_sample and s in seen):
                rank += 1
                seen.add(s)
                table.append((f, rank, s, p, -h))
    return table


# --- statistics ------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 60), st.integers(1, 6), st.floats(0, 1))
def test_statistics_equal_their_definition(seed, n, k, fill):
    codes = random_codes(seed, n=n, k=k, d_sae=11, fill=fill)
    stats = mt.feature_stats(codes)
    assert stats.n_tokens == n
    assert stats.d_sae == 11
    assert_same(stats, definition(codes.to_dense()))
    assert_same(mt.feature_stats(codes.to_ragged()), definition(codes.to_dense()))


def test_dtypes_and_derived_figures():
    codes = random_codes()
    dense = codes.to_dense().astype(np.float64)
    stats = mt.feature_stats(codes)
    assert [getattr(stats, f).dtype for f in FIELDS] == [np.uint64, np.float64, np.float64, np.float32]
    np.testing.assert_allclose(stats.firing_frequency(), (dense > 0).mean(0))
    np.testing.assert_allclose(stats.mean(), dense.mean(0))
    np.testing.assert_allclose(stats.mean_square(), (dense**2).mean(0))
    assert math.isclose(metrics.l0(codes), (dense > 0).sum(1).mean())
    table = stats.to_polars()
    assert table.height == codes.d_sae
    assert table["fires"].to_list() == stats.fires.tolist()


def test_features_that_never_fire_are_dead():
    codes = SparseCodes(np.array([[1, 2]], np.uint32), np.array([[3.0, 0.0]], np.float32), d_sae=4)
    stats = mt.feature_stats(codes)
    assert stats.dead().tolist() == [True, False, True, True]
    assert stats.max.tolist() == [0, 3, 0, 0]


def test_squares_do_not_overflow():
    h = np.float32(3e38)
    codes = SparseCodes(np.zeros((4, 1), np.uint32), np.full((4, 1), h, np.float32), d_sae=1)
    assert mt.feature_stats(codes).sum_sq[0] == 4 * float(h) ** 2
    half = SparseCodes(np.zeros((3, 1), np.uint32), np.full((3, 1), 60_000, np.float16), d_sae=1)
    assert mt.feature_stats(half).sum_sq[0] == 3 * 60_000.0**2


def test_negative_activations_do_not_fire_but_are_summed():
    codes = SparseCodes(np.zeros((2, 1), np.uint32), np.array([[-2.0], [1.0]], np.float32), d_sae=1)
    stats = mt.feature_stats(codes)
    assert (stats.fires[0], stats.sum[0], stats.sum_sq[0], stats.max[0]) == (1, -1, 5, 1)


def test_tensors_and_arrays_give_the_same():
    torch = pytest.importorskip("torch")
    codes = random_codes()
    tensors = SparseCodes.__new__(SparseCodes)
    for field, value in {
        "indices": torch.from_numpy(codes.indices.astype(np.int64)),
        "values": torch.from_numpy(codes.values),
        "d_sae": codes.d_sae,
    }.items():
        object.__setattr__(tensors, field, value)
    assert_same(mt.feature_stats(tensors), definition(codes.to_dense()))


@pytest.mark.parametrize("threads", [1, 2, 3, 7, 16])
def test_any_number_of_threads_gives_the_same_bits(threads):
    rng = np.random.default_rng(0)
    n = 70_000  # several blocks of the grid
    codes = SparseCodes(
        rng.integers(0, 900, (n, 2)).astype(np.uint32), rng.random((n, 2)).astype(np.float32), 900
    )
    rows = {"sample": rng.integers(0, 500, n), "position": np.arange(n)}
    x = rng.standard_normal((4000, 9), dtype=np.float32)
    before = mt.num_threads()
    try:
        mt.set_num_threads(1)
        one, one_top, one_fvu = mt.feature_stats(codes), mt.top_samples(codes, rows, n=5), mt.fvu(x, x * 0.9)
        mt.set_num_threads(threads)
        many, many_top, many_fvu = (
            mt.feature_stats(codes),
            mt.top_samples(codes, rows, n=5),
            mt.fvu(x, x * 0.9),
        )
    finally:
        mt.set_num_threads(before)
    assert all(getattr(one, f).tobytes() == getattr(many, f).tobytes() for f in FIELDS)
    assert one_top.equals(many_top)
    assert one_fvu == many_fvu


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_order_of_rows_and_slots_does_not_matter(seed):
    rng = np.random.default_rng(seed)
    codes = random_codes(seed, n=80)
    shuffled = codes[rng.permutation(80)]
    a, b = mt.feature_stats(codes), mt.feature_stats(shuffled)
    assert (a.fires == b.fires).all()
    assert (a.max == b.max).all()
    np.testing.assert_allclose(a.sum, b.sum, rtol=1e-13)
    np.testing.assert_allclose(a.sum_sq, b.sum_sq, rtol=1e-13)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1), st.lists(st.integers(1, 99), min_size=2, max_size=2, unique=True))
def test_shards_merge_to_the_whole_in_any_bracketing(seed, cuts):
    codes = random_codes(seed, n=100)
    i, j = sorted(cuts)
    a, b, c = (mt.feature_stats(codes[part]) for part in (slice(i), slice(i, j), slice(j, None)))
    for stats in (a.merge(b).merge(c), a.merge(b.merge(c)), c.merge(a).merge(b)):
        assert stats.n_tokens == 100
        assert_same(stats, definition(codes.to_dense()))


# --- groups ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "labels", [np.arange(300) % 3, np.array(["image", "text", "video"])[np.arange(300) % 3]]
)
def test_groups_equal_statistics_of_their_rows(labels):
    codes = random_codes()
    groups = mt.feature_stats(codes, by=labels)
    assert set(groups) == set(labels.tolist())
    for key, stats in groups.items():
        chosen = np.asarray(labels) == key
        assert stats.n_tokens == chosen.sum()
        assert_same(stats, definition(codes.to_dense()[chosen]))


def test_polars_expression_groups_over_the_row_table():
    codes = random_codes()
    rows = pl.LazyFrame({"kind": ["image", "text", "text"] * 100, "position": np.arange(300)})
    groups = mt.feature_stats(codes, by=pl.col("kind") == "image", rows=rows)
    assert set(groups) == {True, False}
    assert groups[True].n_tokens == 100
    by_name = mt.feature_stats(codes, by="kind", rows=rows)
    assert (by_name["image"].fires == groups[True].fires).all()
    keyed = mt.feature_stats(codes, by=(pl.col("position") // 150).alias("half"), rows=rows.collect())
    assert keyed[0].merge(keyed[1]).fires.tolist() == mt.feature_stats(codes).fires.tolist()


# --- gaps and odds ---------------------------------------------------------------------------------------


def test_variance_gap_is_the_difference_of_uncentred_second_moments():
    vision, text = random_codes(1), random_codes(2, n=120)
    expected = (vision.to_dense().astype(np.float64) ** 2).mean(0) - (
        text.to_dense().astype(np.float64) ** 2
    ).mean(0)
    np.testing.assert_allclose(mt.variance_gap(vision, text), expected, rtol=1e-12, atol=1e-15)
    np.testing.assert_allclose(
        mt.variance_gap(mt.feature_stats(vision), mt.feature_stats(text)), expected, atol=1e-15
    )


def counts(n, fires):
    zeros = np.zeros(len(fires))
    return mt.FeatureStats(n, np.asarray(fires, np.uint64), zeros, zeros, zeros.astype(np.float32))


def test_odds_ratio_equals_its_definition():
    s, b = counts(50, [0, 10, 50, 20]), counts(200, [0, 10, 100, 200])
    odds = mt.odds_ratio(s, b)
    for i, (a, c) in enumerate(zip(s.fires.tolist(), b.fires.tolist(), strict=True)):
        cells = [a + 0.5, 50 - a + 0.5, c + 0.5, 200 - c + 0.5]
        ratio, error = cells[0] * cells[3] / (cells[1] * cells[2]), math.sqrt(sum(1 / x for x in cells))
        assert math.isclose(odds.odds_ratio[i], ratio)
        assert math.isclose(odds.log_odds_ratio[i], math.log(ratio))
        assert math.isclose(odds.log_standard_error[i], error)
        assert math.isclose(odds.p_value[i], math.erfc(abs(math.log(ratio)) / error / math.sqrt(2)))
    low, high = odds.confidence_interval(0.95)
    np.testing.assert_allclose(np.log(high / low) / 2, 1.959964 * odds.log_standard_error, rtol=1e-6)
    assert ((low < odds.odds_ratio) & (odds.odds_ratio < high)).all()


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 1000), st.lists(st.floats(0, 1), min_size=1, max_size=9))
def test_a_set_against_itself_has_odds_ratio_one(n, shares):
    s = counts(n, [round(n * share) for share in shares])
    odds = mt.odds_ratio(s, s)
    assert (odds.odds_ratio == 1).all()
    assert (odds.p_value == 1).all()


def test_q_values_follow_benjamini_and_hochberg():
    odds = mt.odds_ratio(counts(100, [50, 30, 22, 10]), counts(100, [10, 20, 18, 10]))
    p = odds.p_value
    m = len(p)
    ranks = {i: sorted(p).index(p[i]) + 1 for i in range(m)}
    expected = [min(1, *(p[j] * m / ranks[j] for j in range(m) if p[j] >= p[i]), 1) for i in range(m)]
    np.testing.assert_allclose(odds.q_value(), expected)
    assert (odds.q_value() >= p).all()
    assert odds.to_polars().height == m


def test_swapping_the_sets_inverts_the_odds_ratio():
    s, b = counts(50, [0, 10, 50]), counts(200, [0, 10, 100])
    np.testing.assert_allclose(mt.odds_ratio(s, b).odds_ratio * mt.odds_ratio(b, s).odds_ratio, 1)


# --- samples ---------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 4), st.booleans(), st.booleans())
def test_top_samples_equal_a_full_sort(seed, n, per_sample, tied):
    rng = np.random.default_rng(seed)
    codes = random_codes(seed, n=60, k=3, d_sae=8)
    if tied:  # few distinct values: the order of ties decides
        codes = SparseCodes(codes.indices, np.ceil(codes.values).clip(0, 2), codes.d_sae)
    samples, positions = rng.integers(0, 9, 60).tolist(), rng.permutation(60).tolist()
    found = mt.top_samples(codes, {"sample": samples, "position": positions}, n, per_sample=per_sample)
    assert found.columns == ["feature", "rank", "sample", "position", "activation"]
    assert found.rows() == top_definition(codes.to_dense(), samples, positions, n, per_sample)


def test_top_samples_over_many_blocks_equal_a_full_sort():
    rng = np.random.default_rng(3)
    n = 20_000
    codes = SparseCodes(
        rng.integers(0, 5, (n, 1)).astype(np.uint32), rng.random((n, 1)).astype(np.float32), 5
    )
    samples, positions = rng.integers(0, 700, n), rng.integers(0, 50, n)
    found = mt.top_samples(codes, {"sample": samples, "position": positions}, n=20)
    assert found.rows() == top_definition(codes.to_dense(), samples.tolist(), positions.tolist(), 20)


def test_top_samples_of_chosen_features_and_of_groups():
    codes = random_codes()
    rows = pl.DataFrame(
        {"sample": np.arange(300) // 10, "position": np.arange(300) % 10, "split": ["a", "b"] * 150}
    )
    every = mt.top_samples(codes, rows, n=3)
    chosen = mt.top_samples(codes, rows.lazy(), n=3, features=[30, 4])
    assert chosen["feature"].unique(maintain_order=True).to_list() == [30, 4]
    assert chosen.sort("feature", "rank").equals(every.filter(pl.col("feature").is_in([4, 30])))
    grouped = mt.top_samples(codes, rows, n=3, by="split")
    mask = np.arange(300) % 2 == 0
    alone = mt.top_samples(codes[mask], rows.filter(pl.Series(mask)), n=3)
    assert grouped.filter(pl.col("group") == "a").drop("group").equals(alone)


@pytest.mark.parametrize(
    "ids", [[1, 2**64 - 1, 7], [2**63, 2**63, 3], [2**64, 2**100, 2**64], [-(2**70), 2**70, 0]]
)
def test_integers_of_128_bits_are_ids_and_positions_like_others(ids):
    codes = SparseCodes(np.zeros((3, 1), np.uint32), np.array([[1.0], [3.0], [2.0]], np.float32), d_sae=1)
    table = pl.DataFrame(
        {"sample": ids, "position": [0, 1, 2]}, schema=dict.fromkeys(["sample", "position"], pl.Int128)
    )
    found = mt.top_samples(codes, table, n=3, per_sample=False)
    assert found["sample"].to_list() == [ids[1], ids[2], ids[0]]
    assert found["position"].to_list() == [1, 2, 0]
    assert metrics.sample_fires(codes, table).n_samples == len(set(ids))
    with pytest.raises(ShapeError, match="expected positions from 0, found 0 to 4294967296"):
        mt.top_samples(codes, table.with_columns(position=pl.Series([0, 1, 2**32], dtype=pl.Int128)))


def test_sample_ids_may_be_strings():
    codes = SparseCodes(np.zeros((3, 1), np.uint32), np.array([[1.0], [1.0], [2.0]], np.float32), d_sae=1)
    rows = {"sample": ["cat", "ape", "dog"], "position": [0, 0, 0]}
    assert mt.top_samples(codes, rows)["sample"].to_list() == ["dog", "ape", "cat"]


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_sample_counts_equal_their_definition(seed):
    samples = np.random.default_rng(seed).integers(0, 13, 90)
    codes = random_codes(seed, n=90)
    found = metrics.sample_fires(codes, {"sample": samples})
    dense = codes.to_dense() > 0
    expected = np.stack([dense[samples == s].any(0) for s in np.unique(samples)]).sum(0)
    assert found.n_samples == len(np.unique(samples))
    assert found.fires.tolist() == expected.tolist()
    assert (mt.odds_ratio(found, found, counts="samples").odds_ratio == 1).all()
    assert found.merge(found).n_samples == 2 * found.n_samples


# --- refusals --------------------------------------------------------------------------------------------


def ragged(indptr, indices, values, d_sae=4):
    codes = RaggedCodes.__new__(RaggedCodes)
    for field, value in zip(
        ("indptr", "indices", "values", "d_sae"), (indptr, indices, values, d_sae), strict=True
    ):
        object.__setattr__(codes, field, np.asarray(value) if field != "d_sae" else value)
    return codes


def fixed(indices, values, d_sae=4):
    codes = SparseCodes.__new__(SparseCodes)
    for field, value in zip(("indices", "values", "d_sae"), (indices, values, d_sae), strict=True):
        object.__setattr__(codes, field, np.asarray(value) if field != "d_sae" else value)
    return codes


F32 = np.float32
GOOD = random_codes()
ROWS = {"sample": np.arange(300), "position": np.arange(300)}
STATS = counts(10, [1, 2])

REFUSALS = {
    "no rows": (lambda: mt.feature_stats(GOOD[:0]), ShapeError, "no rows selected"),
    "no ragged rows": (
        lambda: mt.feature_stats(ragged([0], np.zeros(0, np.uint32), np.zeros(0, F32))),
        ShapeError,
        "no rows selected",
    ),
    "no slots": (
        lambda: mt.feature_stats(fixed(np.zeros((3, 0), np.uint32), np.zeros((3, 0), F32))),
        ShapeError,
        "codes",
    ),
    "empty mask": (lambda: mt.feature_stats(GOOD[np.zeros(300, bool)]), ShapeError, "no rows selected"),
    "dense codes": (
        lambda: mt.feature_stats(np.zeros((3, 4), F32)),
        DtypeError,
        "codes: expected SparseCodes",
    ),
    "float indices": (
        lambda: mt.feature_stats(fixed([[1.0]], np.ones((1, 1), F32))),
        DtypeError,
        "codes.indices",
    ),
    "integer values": (lambda: mt.feature_stats(fixed([[1]], [[1]])), DtypeError, "codes.values"),
    "negative index": (
        lambda: mt.feature_stats(fixed([[-1]], np.ones((1, 1), F32))),
        ShapeError,
        "codes.indices",
    ),
    "index beyond the dictionary": (
        lambda: mt.feature_stats(fixed([[1], [4]], np.ones((2, 1), F32))),
        ShapeError,
        "below d_sae = 4, found 4 at row 1, slot 0",
    ),
    "index beyond, top samples": (
        lambda: mt.top_samples(fixed([[4]], np.ones((1, 1), F32)), {"sample": [0], "position": [0]}),
        ShapeError,
        "d_sae = 4",
    ),
    "index beyond, sample counts": (
        lambda: metrics.sample_fires(fixed([[4]], np.ones((1, 1), F32)), {"sample": [0]}),
        ShapeError,
        "d_sae = 4",
    ),
    "NaN": (
        lambda: mt.feature_stats(fixed([[1], [2]], np.array([[1], [np.nan]], F32))),
        NonFiniteError,
        "codes.values: expected finite values, found NaN at row 1",
    ),
    "infinity": (lambda: mt.feature_stats(fixed([[1]], np.array([[np.inf]], F32))), NonFiniteError, "inf"),
    "NaN in top samples": (
        lambda: mt.top_samples(fixed([[1]], np.array([[np.nan]], F32)), {"sample": [0], "position": [0]}),
        NonFiniteError,
        "codes.values",
    ),
    "NaN in sample counts": (
        lambda: metrics.sample_fires(fixed([[1]], np.array([[np.nan]], F32)), {"sample": [0]}),
        NonFiniteError,
        "codes.values",
    ),
    "shapes differ": (lambda: mt.feature_stats(fixed([[1, 2]], np.ones((1, 1), F32))), ShapeError, "codes"),
    "indptr falls": (
        lambda: mt.feature_stats(ragged([0, 2, 1, 2], np.zeros(2, np.uint32), np.ones(2, F32))),
        ShapeError,
        "indptr",
    ),
    "indptr too short": (
        lambda: mt.feature_stats(ragged([0, 1], np.zeros(2, np.uint32), np.ones(2, F32))),
        ShapeError,
        "indptr",
    ),
    "labels too few": (
        lambda: mt.feature_stats(GOOD, by=np.arange(299)),
        ShapeError,
        "by: expected 300 labels",
    ),
    "labels of two dimensions": (
        lambda: mt.feature_stats(GOOD, by=np.zeros((300, 1), int)),
        ShapeError,
        "shape",
    ),
    "float labels": (lambda: mt.feature_stats(GOOD, by=np.zeros(300)), DtypeError, "by"),
    "expression without rows": (lambda: mt.feature_stats(GOOD, by=pl.col("kind")), ShapeError, "rows"),
    "unknown column": (lambda: mt.feature_stats(GOOD, by="kind", rows=ROWS), ShapeError, "kind"),
    "row table too long": (
        lambda: mt.feature_stats(GOOD[:10], by="sample", rows=ROWS),
        ShapeError,
        "rows: expected 10 rows",
    ),
    "gap of two widths": (
        lambda: mt.variance_gap(STATS, counts(10, [1])),
        ShapeError,
        "text: expected d_sae = 2",
    ),
    "merge of two widths": (lambda: STATS.merge(counts(10, [1])), ShapeError, "d_sae = 2"),
    "odds of two widths": (
        lambda: mt.odds_ratio(STATS, counts(10, [1])),
        ShapeError,
        "base: expected d_sae = 2",
    ),
    "odds of another unit": (
        lambda: mt.odds_ratio(STATS, STATS, counts="samples"),
        DtypeError,
        "SampleFires",
    ),
    "odds of an unknown unit": (lambda: mt.odds_ratio(STATS, STATS, counts="rows"), ShapeError, "counts"),
    "sample counts as token counts": (
        lambda: mt.odds_ratio(SampleFires(1, STATS.fires), STATS),
        DtypeError,
        "FeatureStats",
    ),
    "level above one": (lambda: mt.odds_ratio(STATS, STATS).confidence_interval(95), ShapeError, "level"),
    "no position": (lambda: mt.top_samples(GOOD, {"sample": np.arange(300)}), ShapeError, "position"),
    "samples too few": (
        lambda: mt.top_samples(GOOD, {"sample": [1], "position": [0]}),
        ShapeError,
        "rows: expected 300",
    ),
    "negative position": (
        lambda: mt.top_samples(GOOD, {**ROWS, "position": -np.arange(300)}),
        ShapeError,
        "positions",
    ),
    "null sample": (
        lambda: mt.top_samples(GOOD, {**ROWS, "sample": pl.Series([None] * 300, dtype=pl.Int64)}),
        ShapeError,
        "null",
    ),
    "float position": (
        lambda: mt.top_samples(GOOD, {**ROWS, "position": np.arange(300.0)}),
        ShapeError,
        "position",
    ),
    "n of zero": (
        lambda: mt.top_samples(GOOD, ROWS, n=0),
        ShapeError,
        "n: expected a whole number of at least 1",
    ),
    "feature beyond": (lambda: mt.top_samples(GOOD, ROWS, features=[37]), ShapeError, "features"),
    "feature twice": (lambda: mt.top_samples(GOOD, ROWS, features=[3, 3]), ShapeError, "features"),
    "not a row table": (lambda: mt.top_samples(GOOD, 3), DtypeError, "rows"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_bad_input_is_refused_by_name(case):
    call, kind, message = REFUSALS[case]
    with pytest.raises(kind) as caught:
        call()
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "count",
    [
        lambda codes, groups: metrics.feature_stats(codes, by=groups),
        lambda codes, groups: metrics.top_samples(codes, {"sample": groups, "position": groups}, by=groups),
    ],
    ids=["feature_stats", "top_samples"],
)
def test_more_groups_than_memory_are_refused_before_any_work(count):
    n = 100_000
    codes = SparseCodes(np.zeros((n, 1), np.uint32), np.ones((n, 1), F32), d_sae=1 << 17)
    with pytest.raises(MemoryError, match="Use fewer groups"):
        count(codes, np.arange(n))


def test_negative_activations_are_kept_in_every_form():
    codes = SparseCodes(np.array([[1, 0], [2, 1]], np.uint32), np.array([[2.0, -1.5], [-0.5, 0.0]], F32), 3)
    dense = np.array([[-1.5, 2.0, 0.0], [0.0, 0.0, -0.5]], F32)
    assert np.array_equal(codes.to_dense(), dense)
    assert np.array_equal(codes.to_ragged().to_dense(), dense)
    assert np.array_equal(codes.decode(np.eye(3, dtype=F32)), dense)


def test_row_pointers_that_fall_are_refused_whatever_their_type():
    for dtype in (np.int64, np.uint64):
        with pytest.raises(ShapeError, match="indptr"):
            metrics.RaggedCodes(np.array([0, 2, 1, 3], dtype), np.zeros(3, np.uint32), np.ones(3, F32), 4)


BOUNDS = {
    "none": (np.zeros(0, np.int64), r"indptr: expected (n + 1,) numbers, found shape (0,)"),
    "matrix": (np.zeros((2, 2), np.int64), r"indptr: expected (n + 1,) numbers, found shape (2, 2)"),
    "late": (np.arange(1, 4), "indptr: expected to rise from 0 to 3, found 1 to 3"),
    "short": (np.arange(3), "indptr: expected to rise from 0 to 3, found 0 to 2"),
    "falls": (np.array([0, 2, 1, 3]), "indptr: expected to rise from 0 to 3, found 2 and then 1 at row 1"),
    "long": (np.zeros(5000, np.int64), "indptr: expected to rise from 0 to 3, found 0 to 0"),
    "floats": (np.array([0.0, 1.5, 3.0]), "indptr: expected integers, found float64"),
}


@pytest.mark.parametrize("case", BOUNDS)
def test_bad_row_pointers_are_refused_in_one_line(case):
    indptr, message = BOUNDS[case]
    with pytest.raises((ShapeError, DtypeError)) as caught:
        metrics.RaggedCodes(indptr, np.zeros(3, np.uint32), np.ones(3, F32), 4)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    "rows", [np.zeros((300, 2), int), np.full(500, 0.5), 3], ids=["matrix", "floats", "row"]
)
def test_what_selects_no_rows_is_refused_in_one_line(rows):
    found = np.asarray(rows)
    for codes in (GOOD, GOOD.to_ragged()):
        with pytest.raises(ShapeError) as caught:
            codes[rows]
        assert str(caught.value).endswith(f"row numbers or a mask, found {found.dtype} {found.shape}")


@pytest.mark.parametrize("none", [[], np.zeros(0, np.int64), ()])
def test_top_samples_of_no_features_are_an_empty_table(none):
    of_one, of_none = (mt.top_samples(GOOD, ROWS, features=wanted) for wanted in ([3], none))
    assert of_none.height == 0
    assert of_none.schema == of_one.schema


ROOM = Path(metrics.__file__).parent
EXAMPLES = [path.stem for path in sorted(ROOM.glob("*.py")) if ">>> " in path.read_text()]


@pytest.mark.parametrize("module", EXAMPLES)
def test_examples_in_docstrings_say_what_is_printed(module):
    found = doctest.testmod(
        import_module(f"microtome.metrics.{module}"), optionflags=doctest.NORMALIZE_WHITESPACE
    )
    assert found.attempted
    assert found.failed == 0

"""The frequency gap and its cluster bootstrap: point, seed, threads, coverage, refusals."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest

import microtome as mt
from microtome.errors import NonFiniteError, ShapeError, UndefinedWarning
from microtome.metrics import SparseCodes, frequency_gap

F32 = np.float32


def clustered(seed, n_clusters=40, size=10, rates=(0.3, 0.6), spread=0.2):
    """One slot per feature; clusters differ in how often a feature fires."""
    rng = np.random.default_rng(seed)
    d_sae, n = len(rates), n_clusters * size
    own = np.clip(np.array(rates) + spread * rng.standard_normal((n_clusters, d_sae)), 0, 1)
    values = (rng.random((n, d_sae)) < np.repeat(own, size, 0)).astype(F32)
    codes = SparseCodes(np.tile(np.arange(d_sae, dtype=np.uint32), (n, 1)), values, d_sae)
    return codes, pl.DataFrame({"sample": np.repeat(np.arange(n_clusters), size)})


def test_the_gap_is_the_difference_of_frequencies():
    (a, rows_a), (b, rows_b) = clustered(0), clustered(1, n_clusters=25)
    found = frequency_gap(a, rows_a, b, rows_b, replicates=50)
    np.testing.assert_allclose(found.gap, (a.values > 0).mean(0) - (b.values > 0).mean(0), rtol=1e-12)
    assert found.n_clusters == (40, 25)
    assert (found.low <= found.high).all()
    assert found.to_polars().height == a.d_sae


def test_a_set_against_itself_has_no_gap_in_any_replicate():
    codes, rows = clustered(0)
    found = frequency_gap(codes, rows, codes, rows, replicates=64)
    for values in (found.gap, found.standard_error, found.low, found.high):
        assert (values == 0).all()
    assert not found.excludes_zero().any()


def test_the_standard_error_is_that_of_cluster_means():
    """Separate draws of clusters of one size: Var = s²_a / C_a + s²_b / C_b over cluster frequencies."""
    (a, rows_a), (b, rows_b) = clustered(2, 200), clustered(3, 100)
    found = frequency_gap(a, rows_a, b, rows_b, shared=False, replicates=2000)
    means = [(c.values > 0).reshape(-1, 10, c.d_sae).mean(1) for c in (a, b)]
    expected = np.sqrt(sum(m.var(0) / len(m) for m in means))
    np.testing.assert_allclose(found.standard_error, expected, rtol=0.08)
    np.testing.assert_allclose(found.high - found.low, 2 * 1.96 * expected, rtol=0.12)


def test_intervals_cover_the_true_gap():
    hits = 0
    for seed in range(60):
        (a, rows_a), (b, rows_b) = (
            clustered(seed, rates=(0.5,), spread=0.1),
            clustered(1000 + seed, rates=(0.5,), spread=0.1),
        )
        found = frequency_gap(a, rows_a, b, rows_b, shared=False, replicates=200, level=0.9)
        hits += int(found.low[0] <= 0 <= found.high[0])
    assert 45 <= hits <= 60  # 54 expected at 90 %


def test_one_seed_gives_the_same_bits_on_any_number_of_threads():
    (a, rows_a), (b, rows_b) = clustered(0), clustered(1)
    before = mt.num_threads()
    tables = []
    try:
        for threads in (1, 3, 7):
            mt.set_num_threads(threads)
            tables.append(frequency_gap(a, rows_a, b, rows_b, replicates=100, seed=5).to_polars())
    finally:
        mt.set_num_threads(before)
    assert tables[0].equals(tables[1])
    assert tables[0].equals(tables[2])
    assert not tables[0].equals(frequency_gap(a, rows_a, b, rows_b, replicates=100, seed=6).to_polars())


def test_clusters_may_be_named_by_any_expression():
    codes, rows = clustered(0)
    named = rows.with_columns(("image-" + pl.col("sample").cast(pl.String).str.zfill(3)).alias("image"))
    by_name = frequency_gap(codes, named, codes[:200], named[:200], cluster="image", replicates=80)
    by_number = frequency_gap(codes, rows, codes[:200], rows[:200], cluster=pl.col("sample"), replicates=80)
    assert by_name.to_polars().equals(by_number.to_polars())


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("one", ["spatial", "base", "both", "each its own"])
def test_one_cluster_has_no_interval_and_says_so(one, shared):
    """A cluster drawn alone is the same in every replicate: a point would pass for certainty."""
    (a, rows_a), (b, rows_b) = clustered(0, n_clusters=3), clustered(1, n_clusters=3)
    if one != "base":
        a, rows_a = a[:10], rows_a[:10]
    if one != "spatial":
        b, rows_b = b[:10], rows_b[:10]
    if one == "each its own":
        rows_b = rows_b + 1
    named = {"spatial": "for spatial:", "base": "for base:"}.get(one, "for spatial, base:")
    with pytest.warns(UndefinedWarning, match=named):
        found = frequency_gap(a, rows_a, b, rows_b, replicates=50, shared=shared)
    np.testing.assert_allclose(found.gap, (a.values > 0).mean(0) - (b.values > 0).mean(0), rtol=1e-12)
    for values in (found.standard_error, found.low, found.high):
        assert np.isnan(values).all()
    assert not found.excludes_zero().any()


CODES, ROWS = clustered(0)
NAN = SparseCodes(CODES.indices, CODES.values * F32(np.nan), 2)
REFUSALS = {
    "level": (lambda: frequency_gap(CODES, ROWS, CODES, ROWS, level=95), ShapeError, "level"),
    "one replicate": (
        lambda: frequency_gap(CODES, ROWS, CODES, ROWS, replicates=1),
        ShapeError,
        "replicates",
    ),
    "no rows": (lambda: frequency_gap(CODES[:0], ROWS[:0], CODES, ROWS), ShapeError, "no rows selected"),
    "rows too few": (
        lambda: frequency_gap(CODES, ROWS[:5], CODES, ROWS),
        ShapeError,
        "spatial_rows: expected 400",
    ),
    "no cluster column": (
        lambda: frequency_gap(CODES, ROWS, CODES, ROWS, cluster="image"),
        ShapeError,
        "image",
    ),
    "other width": (
        lambda: frequency_gap(CODES, ROWS, SparseCodes(CODES.indices, CODES.values, 3), ROWS),
        ShapeError,
        "base: expected d_sae = 2",
    ),
    "clusters of two types": (
        lambda: frequency_gap(CODES, ROWS, CODES, ROWS.cast(pl.String)),
        ShapeError,
        "base_rows: expected clusters of Int64",
    ),
    "null cluster": (
        lambda: frequency_gap(CODES, ROWS.with_columns(sample=pl.lit(None, pl.Int64)), CODES, ROWS),
        ShapeError,
        "null",
    ),
    "NaN": (lambda: frequency_gap(NAN, ROWS, CODES, ROWS), NonFiniteError, "codes.values"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_bad_input_is_refused_by_name(case):
    call, kind, message = REFUSALS[case]
    with pytest.raises(kind) as caught:
        call()
    assert message in str(caught.value)

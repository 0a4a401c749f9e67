"""Decoder cosines and best matches against every cosine in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import microtome as mt
from microtome.errors import NonFiniteError, ShapeError, UndefinedWarning
from microtome.metrics import mutual_matches


def definition(a, b):
    """All cosines, (d_sae_a, d_sae_b), float64."""
    a, b = (
        w.astype(np.float64) / np.linalg.norm(w.astype(np.float64), axis=1, keepdims=True) for w in (a, b)
    )
    return a @ b.T


def dictionaries(n, m, d, seed=0):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((n, d), dtype=np.float32), rng.standard_normal((m, d), dtype=np.float32)


def test_decoder_cosine_is_its_definition():
    a, b = dictionaries(200, 200, 33)
    assert mt.decoder_cosine(a, b) == pytest.approx(np.diag(definition(a, b)), abs=1e-14)
    assert mt.decoder_cosine(a, -5 * a) == pytest.approx(-np.ones(200), abs=1e-15)


@settings(max_examples=25, deadline=None)
@given(
    n=st.integers(1, 60),
    m=st.integers(1, 90),
    d=st.integers(1, 50),
    k=st.integers(1, 4),
    seed=st.integers(0, 99),
)
def test_matches_are_the_k_largest_of_all_cosines(n, m, d, k, seed):
    a, b = dictionaries(n, m, d, seed)
    cosines, k = definition(a, b), min(k, m)
    found = mt.match_features(a, b, k)
    best = -np.sort(-cosines, axis=1)[:, :k]
    assert found.cosines == pytest.approx(best, abs=1e-14)
    assert np.take_along_axis(cosines, found.indices, 1) == pytest.approx(best, abs=1e-14)


def test_ties_go_to_the_lower_index():
    a, b = dictionaries(5, 3, 8)
    assert mt.match_features(a, np.concatenate([b, 2 * b, b]), 3).indices.tolist() == [
        [j, j + 3, j + 6] for j in definition(a, b).argmax(1)
    ]


def test_planted_permutation_with_noise_is_found():
    a, noise = dictionaries(400, 400, 64)
    order = np.random.default_rng(1).permutation(400)
    indices, cosines = mt.match_features(a[order] + 0.1 * noise, a)
    assert np.array_equal(indices.ravel(), order)
    assert (cosines > 0.9).all()


def test_mutual_matches_are_best_in_both_directions():
    a, b = dictionaries(50, 70, 6)
    cosines = definition(a, b)
    pairs = [(i, j) for i, j in enumerate(cosines.argmax(1)) if cosines[:, j].argmax() == i]
    found = mutual_matches(a, b)
    assert list(zip(found.a.tolist(), found.b.tolist(), strict=True)) == pairs
    kept = mt.match_features(a, b, mutual=True)
    assert np.array_equal(np.flatnonzero(kept.indices[:, 0] >= 0), found.a)
    assert np.isnan(kept.cosines[kept.indices < 0]).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_equals_its_widened_values(dtype):
    a, b = (torch.from_numpy(w).to(dtype) for w in dictionaries(40, 40, 16))
    assert np.array_equal(mt.decoder_cosine(a, b), mt.decoder_cosine(a.float(), b.float()))
    assert np.array_equal(mt.match_features(a, b).cosines, mt.match_features(a.float(), b.float()).cosines)


def test_extreme_scales_do_not_change_matches():
    a, b = dictionaries(30, 40, 12)
    expected = mt.match_features(a, b, 2)
    for scale in (1e-30, 1e25):
        found = mt.match_features(a * np.float32(scale), b, 2)
        assert np.array_equal(found.indices, expected.indices)
    assert np.array_equal(mt.match_features(a, b * np.float32(1e25), 2).indices, expected.indices)


def test_zero_rows_are_nan_and_listed():
    a, b = dictionaries(4, 4, 5)
    a[2] = 0
    with pytest.warns(UndefinedWarning, match=r"feature 2: the row is zero"):
        assert np.isnan(mt.decoder_cosine(a, b)).tolist() == [False, False, True, False]
    with pytest.warns(UndefinedWarning, match=r"feature 2 of W_a"):
        found = mt.match_features(a, b)
    assert found.indices[2, 0] == -1
    assert np.isnan(found.cosines[2, 0])
    with pytest.warns(UndefinedWarning, match=r"feature 2 of W_b"):
        assert 2 not in mt.match_features(b, a, 4).indices


def test_results_are_the_same_bits_for_any_number_of_threads():
    a, b = dictionaries(300, 700, 40)
    threads = mt.num_threads()
    try:
        results = set()
        for n in (1, 2, 3, 7, 16):
            mt.set_num_threads(n)
            found = mt.match_features(a, b, 3)
            results.add(
                found.indices.tobytes() + found.cosines.tobytes() + mt.decoder_cosine(a, b[:300]).tobytes()
            )
    finally:
        mt.set_num_threads(threads)
    assert len(results) == 1


def test_bad_input_is_refused_by_name():
    a, b = dictionaries(6, 6, 4)
    with pytest.raises(ShapeError, match="W_b: expected width 4, as W_a, found width 3"):
        mt.match_features(a, b[:, :3])
    with pytest.raises(ShapeError, match=r"W_b: expected shape \(6, 4\), as W_a, found shape \(5, 4\)"):
        mt.decoder_cosine(a, b[:5])
    for k in (0, 7):
        with pytest.raises(ShapeError, match=f"k: expected 1 to 6, the rows of W_b, found {k}"):
            mt.match_features(a, b, k)
    with pytest.raises(ShapeError, match="k: expected 1 with mutual=True"):
        mt.match_features(a, b, 2, mutual=True)
    b[3, 1] = np.nan
    for call in (mt.match_features, mt.decoder_cosine):
        with pytest.raises(NonFiniteError, match="W_b: expected finite values, found NaN at row 3, column 1"):
            call(a, b)

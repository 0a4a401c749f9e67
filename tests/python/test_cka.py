"""Linear CKA: its definition in float64, its invariances, and the inputs on which the packages fail."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import microtome as mt
from microtome.errors import DtypeError, NonFiniteError, ShapeError, UndefinedWarning


def definition(x, y, debiased=True):
    """CKA from n x n Gram matrices, as written in the papers."""
    n = len(x)

    def hsic(k, l):  # noqa: E741
        inner, rows, totals = (k * l).sum(), k.sum(0) @ l.sum(0), k.sum() * l.sum()
        if debiased:
            return (inner + totals / ((n - 1) * (n - 2)) - 2 / (n - 2) * rows) / (n * (n - 3))
        return (inner + totals / n**2 - 2 / n * rows) / (n - 1) ** 2

    x, y = (z.astype(np.float64) - z.astype(np.float64).mean(0) for z in (x, y))
    k, l = (z @ z.T * (1 - np.eye(n) * debiased) for z in (x, y))  # noqa: E741
    return hsic(k, l) / np.sqrt(hsic(k, k) * hsic(l, l))


def layers(n, *widths, seed=0):
    rng = np.random.default_rng(seed)
    shared = rng.standard_normal((n, 3))
    return [
        (rng.standard_normal((n, d)) + shared @ rng.standard_normal((3, d))).astype(np.float32)
        for d in widths
    ]


@settings(max_examples=30, deadline=None)
@given(n=st.integers(5, 200), dx=st.integers(1, 70), dy=st.integers(1, 40), seed=st.integers(0, 999))
def test_linear_cka_is_its_definition(n, dx, dy, seed):
    x, y = layers(n, dx, dy, seed=seed)
    for debiased in (True, False):
        expected = definition(x, y, debiased)
        if abs(expected) < 5:  # a debiased self-term near zero makes any value possible
            assert mt.linear_cka(x, y, debiased) == pytest.approx(expected, abs=2e-5)


def test_cka_matrix_holds_every_pair():
    xs = layers(60, 5, 17, 64)
    ours = mt.cka_matrix(xs)
    assert ours == pytest.approx(np.array([[definition(x, y) for y in xs] for x in xs]), abs=1e-5)
    assert np.array_equal(ours, ours.T)
    assert mt.cka_matrix(xs[:2], xs[1:]) == pytest.approx(ours[:2, 1:], abs=1e-12)


def test_rotation_scale_and_offset_change_nothing():
    x, y = layers(300, 32, 20)
    rotation = np.linalg.qr(np.random.default_rng(1).standard_normal((32, 32)))[0]
    moved = (-7 * x @ rotation + 100).astype(np.float32)
    assert mt.linear_cka(moved, y) == pytest.approx(mt.linear_cka(x, y), abs=1e-5)


@pytest.mark.parametrize("offset", [0, 10, 100, 1000])
def test_an_offset_of_a_thousand_costs_no_digits(offset):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((256, 512)).astype(np.float32)
    y = x[:, :256].copy()
    expected = definition(x, y)
    assert mt.linear_cka(x + np.float32(offset), y) == pytest.approx(expected, abs=1e-4)
    assert mt.linear_cka(torch.from_numpy(x).bfloat16() + offset, torch.from_numpy(y)) > 0.1


def test_independent_layers_score_zero_unless_biased():
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((2, 64, 512), dtype=np.float32)
    assert abs(mt.linear_cka(x, y)) < 0.1
    assert mt.linear_cka(x, y, debiased=False) > 0.85


def test_debiased_values_are_never_clamped():
    rng = np.random.default_rng(0)
    values = [mt.linear_cka(*rng.standard_normal((2, 50, 30), dtype=np.float32)) for _ in range(40)]
    assert min(values) < 0 < max(values)
    assert abs(np.mean(values)) < 3 * np.std(values) / np.sqrt(40)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_tensors_of_each_dtype_equal_their_widened_values(dtype):
    x, y = (torch.from_numpy(z).to(dtype) for z in layers(80, 12, 9))
    assert mt.linear_cka(x, y) == mt.linear_cka(x.float(), y.float())


def test_results_are_the_same_bits_for_any_number_of_threads_and_any_budget():
    xs = layers(700, 150, 40, 33)
    threads = mt.num_threads()
    try:
        results = []
        for n in (1, 2, 3, 7, 16):
            mt.set_num_threads(n)
            results += [mt.cka_matrix(xs).tobytes(), mt.cka_matrix(xs, memory_budget=2 << 20).tobytes()]
    finally:
        mt.set_num_threads(threads)
    assert len(set(results[::2])) == len(set(results[1::2])) == 1


def test_four_rows_are_enough_and_three_are_refused_by_name():
    x, y = layers(4, 3, 2)
    assert mt.linear_cka(x, y) == pytest.approx(definition(x, y), rel=1e-4)
    with pytest.raises(ShapeError, match="x: expected at least 4 rows, found 3 rows"):
        mt.linear_cka(x[:3], y[:3])
    assert mt.linear_cka(x[:2], y[:2], debiased=False) == pytest.approx(1)
    with pytest.raises(ShapeError, match="x: expected at least 4 rows, found no rows selected"):
        mt.linear_cka(x[:0], y[:0])


def test_a_constant_column_is_fine_and_a_constant_layer_is_nan_with_its_name():
    x, y = layers(40, 5, 4)
    x[:, 2] = 0.1
    assert mt.linear_cka(x, y) == pytest.approx(definition(x, y), abs=1e-5)
    with pytest.warns(UndefinedWarning, match=r"NaN.*xs\[1\]"):
        values = mt.cka_matrix([x, np.full((40, 3), 0.1, np.float32)])
    assert np.isnan(values).tolist() == [[False, True], [True, True]]


def test_bad_input_is_refused_by_name():
    x, y = layers(20, 4, 3)
    with pytest.raises(ShapeError, match="y: expected 20 rows, as in x, found 19 rows"):
        mt.linear_cka(x, y[:-1])
    with pytest.raises(ShapeError, match=r"xs\[2\]: expected 20 rows, as in xs\[0\], found 10 rows"):
        mt.cka_matrix([x, y, x[:10]])
    with pytest.raises(DtypeError, match="y: expected float32, float16 or bfloat16, found float64"):
        mt.linear_cka(x, y.astype(np.float64))
    with pytest.raises(ShapeError, match="x: expected a matrix"):
        mt.linear_cka(x[:, 0], y)
    with pytest.raises(ShapeError, match="xs: expected at least one"):
        mt.cka_matrix([])
    for bad in (np.nan, np.inf):
        y[7, 2] = bad
        with pytest.raises(NonFiniteError, match=r"y: expected finite values, found .* at row 7, column 2"):
            mt.linear_cka(x, y)
    with pytest.raises(MemoryError, match=r"needs \d+ bytes, budget is 1000 bytes"):
        mt.linear_cka(x, x, memory_budget=1000)


def test_massive_activations_keep_their_digits():
    x, y = layers(500, 64, 64)
    x[:, 3] *= 1000
    x[0] *= 300
    assert mt.linear_cka(x, y) == pytest.approx(definition(x, y), abs=1e-5)


@pytest.mark.slow
def test_agrees_with_ckatorch():
    ckatorch = pytest.importorskip("ckatorch")
    x, y = layers(100, 20, 30)
    theirs = ckatorch.core.cka_base(
        torch.from_numpy(x), torch.from_numpy(y), kernel="linear", unbiased=True, method="hsic"
    )
    assert mt.linear_cka(x, y) == pytest.approx(float(theirs), abs=1e-4)

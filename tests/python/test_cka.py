"""Linear CKA: its definition in float64, its invariances, and the inputs on which the packages fail."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import microtome as mt
from microtome.errors import DtypeError, NonFiniteError, ShapeError, UndefinedWarning
from microtome.metrics import cka_interval, minibatch_cka, rbf_cka
from process_memory import FROM_HERE, needs_procfs


def hsic(k, l, debiased=True):  # noqa: E741
    """HSIC of two kernel matrices, as written in the papers."""
    n = len(k)
    if debiased:
        k, l = (m * (1 - np.eye(n)) for m in (k, l))  # noqa: E741
    inner, rows, totals = (k * l).sum(), k.sum(0) @ l.sum(0), k.sum() * l.sum()
    if debiased:
        return (inner + totals / ((n - 1) * (n - 2)) - 2 / (n - 2) * rows) / (n * (n - 3))
    return (inner + totals / n**2 - 2 / n * rows) / (n - 1) ** 2


def gram(x):
    x = x.astype(np.float64) - x.astype(np.float64).mean(0)
    return x @ x.T


def definition(x, y, debiased=True, kernel=gram):
    """CKA from n x n kernel matrices."""
    k, l = kernel(x), kernel(y)  # noqa: E741
    return hsic(k, l, debiased) / np.sqrt(hsic(k, k, debiased) * hsic(l, l, debiased))


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


def rbf(x, fraction=0.7):
    distances = np.linalg.norm(x[:, None].astype(np.float64) - x.astype(np.float64), axis=-1)
    sigma = fraction * np.median(distances[np.triu_indices(len(x), 1)])
    return np.exp(-(distances**2) / (2 * sigma**2))


@pytest.mark.parametrize("n", [40, 45])
def test_rbf_cka_is_its_definition(n):
    x, y = layers(n, 6, 9)
    for debiased in (True, False):
        expected = definition(x, y, debiased, rbf)
        assert rbf_cka(x, y, 0.7, debiased) == pytest.approx(expected, abs=1e-5)
        assert rbf_cka(x + 1000, y, 0.7, debiased) == pytest.approx(expected, abs=1e-3)
    with pytest.raises(ShapeError, match="sigma: expected a positive fraction"):
        rbf_cka(x, y, 0.0)
    with pytest.raises(MemoryError, match=f"RBF CKA of {n} rows needs"):
        rbf_cka(x, y, memory_budget=1000)
    with pytest.warns(UndefinedWarning, match="for y"):
        assert np.isnan(rbf_cka(x, np.ones_like(y)))


@pytest.mark.parametrize(("share", "offset"), [(0.1, 1e2), (0.1, 1e4), (0.3, 1e3), (0.5, 1e5)])
def test_rbf_cka_keeps_the_distances_of_rows_that_lie_together_far_from_the_others(share, offset):
    x, y = layers(300, 64, 32)
    x[: int(share * 300)] += np.float32(offset)
    x[5], y[7] = x[4], y[8]
    for debiased in (True, False):
        assert rbf_cka(x, y, 0.7, debiased) == pytest.approx(definition(x, y, debiased, rbf), abs=2e-6)


@needs_procfs
def test_minibatch_cka_shares_its_budget_between_threads():
    script = (
        f"{FROM_HERE}import numpy as np\n"
        "from microtome.metrics import minibatch_cka\n"
        "from process_memory import peak_bytes as peak\n"
        "xs = list(np.random.default_rng(0).standard_normal((4, 8192, 1024), np.float32))\n"
        "kinds = dict(batch=256, memory_budget=10 << 20)\n"
        "minibatch_cka([x[:64] for x in xs], **kinds)\n"
        "before = peak()\n"
        "values = minibatch_cka(xs, **kinds)\n"
        "print(peak() - before, values.tobytes().hex())"
    )
    values = set()
    for threads in ("1", "6"):
        environment = {**os.environ, "MICROTOME_NUM_THREADS": threads}
        run = subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=True
        )
        grown, hexadecimal = run.stdout.split()
        values.add(hexadecimal)
        assert int(grown) < 20 << 20, (threads, grown)
    assert len(values) == 1


def test_minibatch_cka_averages_hsic_over_batches():
    xs = layers(70, 5, 12)
    batches = [slice(i, i + 16) for i in range(0, 70, 16)]

    def mean(x, y):
        return np.mean([hsic(gram(x[b]), gram(y[b])) for b in batches])

    expected = [[mean(x, y) / np.sqrt(mean(x, x) * mean(y, y)) for y in xs] for x in xs]
    assert minibatch_cka(xs, batch=16) == pytest.approx(np.array(expected), abs=1e-5)
    assert minibatch_cka(xs[:1], xs[1:], batch=16)[0, 0] == pytest.approx(expected[0][1], abs=1e-5)
    assert minibatch_cka(xs, batch=70) == pytest.approx(mt.cka_matrix(xs), abs=1e-6)
    with pytest.raises(ShapeError, match="batch: expected a whole number of at least 4, found 3"):
        minibatch_cka(xs, batch=3)


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    truth = mt.linear_cka(*layers(20_000, 6, 5))
    rng = np.random.default_rng(0)
    x, y = layers(20_000, 6, 5)
    covered = 0
    for trial in range(60):
        rows = rng.choice(20_000, 80, replace=False)
        found = cka_interval(x[rows], y[rows], level=0.9, n_resamples=100, seed=trial)
        covered += found.low <= truth <= found.high
    assert 45 <= covered <= 60


def test_the_interval_is_seeded_and_wider_for_rows_in_groups():
    x, y = layers(60, 6, 5)
    assert cka_interval(x, y, seed=3) == cka_interval(x, y, seed=3)
    assert cka_interval(x, y, seed=3) != cka_interval(x, y, seed=4)
    assert cka_interval(x, y).estimate == pytest.approx(mt.linear_cka(x, y), abs=1e-6)
    groups = np.repeat(np.arange(60), 5)
    repeated_x, repeated_y = (np.repeat(z, 5, 0) + np.float32(1e-3) for z in (x, y))
    alone = cka_interval(repeated_x, repeated_y)
    together = cka_interval(repeated_x, repeated_y, groups=groups)
    assert together.standard_error > 1.5 * alone.standard_error
    with pytest.raises(ShapeError, match="groups: expected at least 8 groups, found 2"):
        cka_interval(x, y, groups=np.arange(60) % 2)
    with pytest.raises(ShapeError, match="groups: expected one group for each of 60 rows, found 3"):
        cka_interval(x, y, groups=[1, 2, 3])
    with pytest.raises(ShapeError, match="x: expected at least 8 rows, found 7 rows"):
        cka_interval(x[:7], y[:7])


@pytest.mark.slow
def test_agrees_with_ckatorch():
    ckatorch = pytest.importorskip("ckatorch")
    x, y = layers(100, 20, 30)
    theirs = ckatorch.core.cka_base(
        torch.from_numpy(x), torch.from_numpy(y), kernel="linear", unbiased=True, method="fro_norm"
    )
    assert mt.linear_cka(x, y) == pytest.approx(float(theirs), abs=1e-5)

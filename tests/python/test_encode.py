"""Sparse codes against their definition in float64, from arrays, tensors and every instruction path."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import microtome as mt
from microtome.errors import DtypeError, NonFiniteError, ShapeError
from microtome.metrics import SparseCodes
from process_memory import FROM_HERE, needs_procfs

PATHS = ["plain", "neon", "neondot", "avx2", "avx512", "avx512bf16", "avx512vnni", "amx"]


def pre_activations(x, W_enc, b_enc=None, b_dec=None):
    x, W_enc = np.asarray(x, np.float64), np.asarray(W_enc, np.float64)
    centre = 0 if b_dec is None else np.asarray(b_dec, np.float64)
    return (x - centre) @ W_enc + (0 if b_enc is None else np.asarray(b_enc, np.float64))


def top_k(pre, k, norms=1.0):
    """The definition: k largest positive per row by rank, sorted by value, ties to the lower index."""
    rank = np.where(pre > 0, pre * norms, 0)
    chosen = np.argsort(-rank, axis=1, kind="stable")[:, :k]
    dense = np.zeros_like(pre)
    np.put_along_axis(dense, chosen, np.where(np.take_along_axis(rank, chosen, 1) > 0, 1, 0), 1)
    return dense * pre


def data(n, d, f, seed=0):
    rng = np.random.default_rng(seed)
    draw = lambda *shape: rng.standard_normal(shape, dtype=np.float32)  # noqa: E731
    return draw(n, d), draw(d, f), draw(f), draw(d)


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(0, 40),
    d=st.integers(1, 70),
    f=st.integers(1, 150),
    seed=st.integers(0, 2**32),
    share=st.floats(0, 1),
)
def test_top_k_codes_equal_the_float64_definition(n, d, f, seed, share):
    x, W, b, _ = data(n, d, f, seed)
    k = max(1, round(share * f))
    codes = mt.topk_encode(x, W, b, k=k)
    assert codes.indices.shape == codes.values.shape == (n, k)
    assert codes.indices.dtype == np.uint32 and codes.values.dtype == np.float32
    expected = top_k(pre_activations(x, W, b), k)
    np.testing.assert_allclose(codes.to_dense(), expected, rtol=1e-6, atol=1e-6)
    assert np.array_equal(codes.to_dense() > 0, expected.astype(np.float32) > 0)
    assert (np.diff(codes.values, axis=1) <= 0).all()
    assert (codes.indices[codes.values == 0] == 0).all()


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32), k=st.integers(1, 9))
def test_equal_scores_go_to_the_lower_index(seed, k):
    rng = np.random.default_rng(seed)
    x, W = rng.integers(-2, 3, (20, 6)).astype(np.float32), rng.integers(-1, 2, (6, 40)).astype(np.float32)
    codes = mt.topk_encode(x, W, k=k)
    rank = pre_activations(x, W)
    for i, row in enumerate(rank):
        order = np.argsort(-row, kind="stable")[:k]
        order = order[row[order] > 0]
        assert codes.indices[i, : len(order)].tolist() == order.tolist()
        assert (codes.values[i, len(order) :] == 0).all()


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_rows_and_weights_of_every_type_are_read_as_stored(dtype):
    torch = pytest.importorskip("torch")
    x, W, b, b_dec = data(50, 96, 600)
    x, W = (torch.from_numpy(t).to(getattr(torch, dtype)) for t in (x, W))
    codes = mt.TopKEncoder(W, torch.from_numpy(b), k=12, b_dec=b_dec)(x)
    expected = top_k(pre_activations(x.double(), W.double(), b, b_dec), 12)
    np.testing.assert_allclose(codes.to_dense(), expected, rtol=1e-6)


@pytest.mark.parametrize("certificate", ["deterministic", "dithered"])
def test_outliers_zeros_and_huge_rows_stay_exact(certificate):
    x, W, b, _ = data(60, 512, 2500, seed=3)
    x[:, [3, 77]] *= 1000
    x[5] = 0
    x[6] *= 1e30
    x[7] *= 1e-40
    x[8] = -np.abs(x[8])
    for bias in (b, None):
        encoder = mt.TopKEncoder(W, bias, k=20, certificate=certificate)
        expected = top_k(pre_activations(x, W, bias), 20)
        np.testing.assert_allclose(encoder(x).to_dense(), expected.astype(np.float32), rtol=1e-6, atol=1e-44)
    assert encoder.last_report.rows == 60 and encoder.last_report.escape_rate > 0
    assert encoder.last_report.candidates_per_k >= 1
    assert min(encoder.last_report.seconds.values()) > 0


def test_a_report_says_how_many_rows_were_screened_twice():
    """Features that suit every row, fewer than are wanted, in the panels that thresholds are guessed from."""
    x, W, _, _ = data(50, 64, 8192)
    x[:, 0] = 3
    encoder = mt.TopKEncoder(W, k=32)
    encoder(x)
    assert encoder.last_report.misjudged_rate < 0.1
    W[0, 7::512] = 9
    encoder = mt.TopKEncoder(W, k=32)
    np.testing.assert_allclose(
        encoder(x).to_dense(), top_k(pre_activations(x, W), 32).astype(np.float32), rtol=1e-6
    )
    assert encoder.last_report.misjudged_rate > 0.5


def test_a_dictionary_of_copies_defeats_the_screen_but_not_the_result():
    x, W, _, _ = data(5, 64, 1)
    x[:, 0] += np.sign(W[0]) * 50
    codes = mt.topk_encode(x, np.repeat(W, 4000, axis=1), k=3)
    assert (codes.indices == [0, 1, 2]).all()


def test_norms_rank_but_values_are_pre_activations():
    x, W, b, _ = data(40, 32, 300)
    norms = np.random.default_rng(1).uniform(0.1, 5, 300).astype(np.float32)
    codes = mt.TopKEncoder(W, b, k=8, norms=norms)(x)
    np.testing.assert_allclose(
        codes.to_dense(), top_k(pre_activations(x, W, b), 8, norms.astype(np.float64)), rtol=1e-6
    )
    assert (np.diff(codes.values, axis=1) <= 0).all()


def test_batch_top_k_keeps_the_largest_of_the_whole_call():
    x, W, b, _ = data(300, 32, 200)
    x[:10] *= 20
    codes = mt.TopKEncoder(W, b, k=6, activation="batch_topk")(x)
    pre = pre_activations(x, W, b)
    expected = np.where(pre >= np.sort(pre[pre > 0])[-6 * 300], pre, 0)
    assert len(codes.values) == 6 * 300
    np.testing.assert_allclose(codes.to_dense(), expected, rtol=1e-6)


def test_batch_top_k_of_many_rows_that_a_few_outweigh():
    x, W, _, _ = data(4000, 32, 500)
    x[:] = np.round(x)
    x[::20] *= 50
    codes = mt.TopKEncoder(np.round(W), k=3, activation="batch_topk")(x)
    pre = pre_activations(x, np.round(W)).ravel()
    chosen = np.argsort(-pre, kind="stable")[: 3 * 4000]
    expected = np.zeros_like(pre)
    expected[chosen] = pre[chosen]
    assert len(codes.values) == 3 * 4000
    np.testing.assert_array_equal(codes.to_dense().ravel(), expected)


@needs_procfs
def test_batch_top_k_holds_no_more_because_a_few_rows_outweigh_the_others():
    script = (
        f"{FROM_HERE}import numpy as np, microtome as mt\n"
        "from process_memory import peak_bytes as peak\n"
        "r = np.random.default_rng(0); x = r.standard_normal((16000, 32), np.float32)\n"
        "W = r.standard_normal((32, 8192), np.float32)\n"
        "x[r.permutation(16000)[: int(sys.argv[1])]] *= 100\n"
        "encoder = mt.TopKEncoder(W, k=4, activation='batch_topk'); encoder(x[:64])\n"
        "before = peak(); codes = encoder(x)\n"
        "print(peak() - before, len(codes.values))"
    )
    grown = {}
    for outweighing in ("0", "1600"):
        run = subprocess.run(
            [sys.executable, "-c", script, outweighing], capture_output=True, text=True, check=True
        )
        grown[outweighing], entries = map(int, run.stdout.split())
        assert entries == 4 * 16000
    assert grown["1600"] < grown["0"] + (48 << 20), grown


def test_batch_top_k_gives_ties_to_the_first_rows():
    codes = mt.TopKEncoder(np.eye(4, dtype=np.float32), k=2, activation="batch_topk")(
        np.ones((5, 4), np.float32)
    )
    assert codes.to_csr()[0].tolist() == [0, 4, 8, 10, 10, 10]
    assert codes.to_csr()[1].tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 0, 1]


@pytest.mark.parametrize("threshold", [0.5, -1.0, "each"])
def test_jump_relu_keeps_what_exceeds_its_threshold(threshold):
    x, W, b, b_dec = data(70, 40, 333)
    each = np.random.default_rng(2).uniform(0, 9, 333).astype(np.float32)
    threshold = each if threshold == "each" else threshold
    codes = mt.TopKEncoder(W, b, b_dec=b_dec, activation="jump_relu", threshold=threshold)(x)
    pre = pre_activations(x, W, b, b_dec)
    np.testing.assert_allclose(codes.to_dense(), np.where(pre > np.maximum(threshold, 0), pre, 0), rtol=1e-5)


def test_relu_keeps_all_that_is_positive():
    x, W, b, _ = data(130, 20, 100)
    codes = mt.TopKEncoder(W, b, activation="relu")(x)
    np.testing.assert_allclose(codes.to_dense(), np.maximum(pre_activations(x, W, b), 0), rtol=1e-5)
    indptr, _, values = codes.to_csr()
    assert all((np.diff(values[a:b]) <= 0).all() for a, b in itertools.pairwise(indptr))


def test_every_instruction_path_gives_the_same_bits():
    script = (
        "import numpy as np, microtome as mt, hashlib\n"
        "r = np.random.default_rng(5); x = r.standard_normal((90, 384), np.float32); x[:, 9] *= 300\n"
        "W = r.standard_normal((384, 3000), np.float32); b = r.standard_normal(3000, np.float32)\n"
        "h = hashlib.sha256()\n"
        "options = [dict(k=16), dict(k=16, certificate='dithered'), dict(activation='relu')]\n"
        "for o in [*options, dict(k=4, activation='batch_topk')]:\n"
        "    e = mt.TopKEncoder(W, b, **o)\n"
        "    for a in e(x).to_csr(): h.update(a.tobytes())\n"
        "print(e.last_report.isa, h.hexdigest())"
    )
    digests = {}
    for path in PATHS:
        environment = {**os.environ, "MICROTOME_ISA": path}
        run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)
        if run.returncode == 0:
            name, digest = run.stdout.split()
            assert name == path
            digests[path] = digest
        else:
            assert "MICROTOME_ISA: expected one of plain" in run.stderr, run.stderr
    assert "plain" in digests and len(set(digests.values())) == 1, digests


def test_threads_and_slices_do_not_show_in_the_codes():
    x, W, b, _ = data(1000, 48, 500)
    threads = mt.num_threads()
    encoder = mt.TopKEncoder(W, b, k=7)
    try:
        results = []
        for n in (1, 2, 3, 7):
            mt.set_num_threads(n)
            results.append(encoder(x))
    finally:
        mt.set_num_threads(threads)
    for other in results[1:]:
        assert np.array_equal(results[0].indices, other.indices) and np.array_equal(
            results[0].values, other.values
        )
    part = encoder(x[123:456])
    assert np.array_equal(results[0][123:456].values, part.values)


def test_codes_convert_slice_and_decode_alike():
    torch = pytest.importorskip("torch")
    x, W, b, b_dec = data(30, 16, 80)
    codes = mt.TopKEncoder(W, b, k=5)(x)
    W_dec = data(80, 16, 1, seed=9)[0]
    dense = codes.to_dense()
    ragged = codes.to_ragged()
    assert np.array_equal(ragged.to_dense(), dense) and len(ragged) == len(codes) == 30
    assert np.array_equal(ragged[::2].to_dense(), dense[::2])
    assert np.array_equal(codes[np.array([4, 1])].to_dense(), dense[[4, 1]])
    assert np.array_equal(ragged[dense.sum(1) > 5].to_dense(), dense[dense.sum(1) > 5])
    np.testing.assert_allclose(codes.decode(W_dec, b_dec), dense @ W_dec + b_dec, rtol=1e-4, atol=1e-4)
    x_hat = ragged.decode(torch.from_numpy(W_dec).bfloat16())
    np.testing.assert_allclose(
        x_hat, dense @ torch.from_numpy(W_dec).bfloat16().float().numpy(), rtol=1e-4, atol=1e-4
    )
    indices, values = codes.to_torch()
    assert indices.dtype == torch.int64 and torch.equal(values, torch.from_numpy(codes.values))
    indptr, indices, values = ragged.to_torch()
    assert (
        torch.equal(indptr.diff(), torch.from_numpy((dense > 0).sum(1)))
        and len(indices) == len(values) == indptr[-1]
    )


def held(codes, kind):
    """The same codes with fields of other types."""
    names = ["indptr", "indices", "values"][-2 if isinstance(codes, SparseCodes) else -3 :]
    fields = [getattr(codes, name) for name in names]
    if kind == "strided":
        fields = [np.repeat(field, 2, axis=-1)[..., ::2] for field in fields]
    elif kind == "wide":
        fields = [field.astype(np.float64 if field.dtype.kind == "f" else np.int64) for field in fields]
    else:
        fields = list(codes.to_torch())
        fields[-1] = fields[-1].bfloat16() if kind == "bfloat16" else fields[-1].requires_grad_()
    return type(codes)(*fields, codes.d_sae)


@pytest.mark.parametrize("n", [0, 7])
@pytest.mark.parametrize("kind", ["gradient", "bfloat16", "wide", "strided"])
@pytest.mark.parametrize("shape", ["slots", "ragged"])
def test_fields_of_every_type_that_statistics_take_are_converted_and_decoded(kind, shape, n):
    pytest.importorskip("torch")
    x, W, b, _ = data(30, 16, 80)
    codes = mt.TopKEncoder(W, b, k=5)(x)[:n]
    codes = SparseCodes(codes.indices, np.round(codes.values * 4) / 4, 80)  # exact in bfloat16
    codes = codes if shape == "slots" else codes.to_ragged()
    W_dec = data(80, 16, 1, seed=9)[0]
    found = held(codes, kind)
    for mine, expected in zip(found.to_csr(), codes.to_csr(), strict=True):
        assert mine.dtype == expected.dtype
        assert np.array_equal(mine, expected)
    for mine, expected in zip(found.to_torch(), codes.to_torch(), strict=True):
        assert mine.dtype == expected.dtype
        assert mine.equal(expected)
    assert np.array_equal(found.to_dense(), codes.to_dense())
    assert np.array_equal(found.decode(W_dec), codes.decode(W_dec))
    assert np.array_equal(found[::2].to_dense(), codes[::2].to_dense())
    assert np.array_equal(found[np.arange(n) % 3 == 0].decode(W_dec), codes[::3].decode(W_dec))


def test_features_that_no_dictionary_has_are_refused_in_every_form():
    codes = SparseCodes(np.array([[-1]]), np.ones((1, 1), np.float32), 4)
    for form in (
        codes.to_csr,
        codes.to_dense,
        codes.to_torch,
        lambda: codes.decode(np.eye(4, dtype=np.float32)),
    ):
        with pytest.raises(ShapeError, match="indices: expected features from 0 to 3, found -1"):
            form()
    codes = SparseCodes(np.array([[0.5]]), np.ones((1, 1), np.float32), 4)
    with pytest.raises(DtypeError, match="indices: expected integers, found float64"):
        codes.to_dense()


X, W, B, _ = data(6, 8, 20)
NO_NORMS = np.zeros(20, np.float32)
ONE_TOO_HIGH = np.array([[20]], np.uint32), np.ones((1, 1), np.float32)


def spoiled(matrix, value):
    matrix = matrix.copy()
    matrix[2, 3] = value
    return matrix


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: mt.topk_encode(X, W[:-1], B, k=3), ShapeError, "x: expected rows of width d_in = 7"),
        (lambda: mt.topk_encode(X, W, B, k=0), ShapeError, "k: expected 1 to d_sae = 20, found 0"),
        (lambda: mt.topk_encode(X, W, B, k=21), ShapeError, "found 21"),
        (lambda: mt.topk_encode(X, W, B), ShapeError, "k: expected 1 to"),
        (lambda: mt.topk_encode(X, W, B, k=2.5), ShapeError, "found 2.5"),
        (lambda: mt.topk_encode(X, W, B[:-1], k=3), ShapeError, "b_enc: expected shape (20,)"),
        (lambda: mt.topk_encode(X[0], W, B, k=3), ShapeError, "x: expected a matrix"),
        (lambda: mt.topk_encode(X.astype(np.float64), W, B, k=3), DtypeError, "x: expected float32"),
        (lambda: mt.topk_encode(X, W.astype(np.int32), B, k=3), DtypeError, "W_enc: expected float32"),
        (lambda: mt.topk_encode(X, spoiled(W, np.inf), B, k=3), NonFiniteError, "found inf at row 2, column 3"),
        (lambda: mt.topk_encode(spoiled(X, np.nan), W, B, k=3), NonFiniteError, "NaN at row 2, column 3"),
        (lambda: mt.TopKEncoder(W, B, k=3, norms=NO_NORMS), ShapeError, "norms: expected positive"),
        (lambda: mt.TopKEncoder(W, B, k=3, threshold=1.0), ShapeError, "threshold: expected None"),
        (lambda: mt.TopKEncoder(W, B, activation="jump_relu"), ShapeError, "threshold: expected a number"),
        (lambda: mt.TopKEncoder(W, B, k=3, activation="relu"), ShapeError, "k: expected None"),
        (lambda: mt.TopKEncoder(W, B, k=3, activation="top"), ShapeError, "activation: expected topk"),
        (lambda: mt.TopKEncoder(W, B, k=3, certificate="none"), ShapeError, "certificate: expected"),
        (lambda: mt.SparseCodes(*ONE_TOO_HIGH, 20), ShapeError, "below d_sae = 20"),
        (lambda: mt.topk_encode(X, W, B, k=3).decode(W), ShapeError, "W_dec: expected (20, d_in)"),
    ],
)  # fmt: skip
def test_bad_input_is_refused_with_the_argument_named(call, error, message):
    with pytest.raises(error) as caught:
        call()
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_norms_rank_and_do_not_gate():
    x, W, b, _ = data(200, 48, 300, seed=3)
    norms = np.random.default_rng(4).uniform(0.05, 5, 300).astype(np.float32)
    for options in ({"activation": "jump_relu", "threshold": np.float32(0.7)}, {"activation": "relu"}):
        plain, normed = (mt.TopKEncoder(W, b, norms=n, **options)(x) for n in (None, norms))
        assert np.array_equal(plain.to_dense(), normed.to_dense())
        pre = pre_activations(x, W, b)
        assert np.array_equal(plain.to_dense() > 0, pre > options.get("threshold", 0))


def test_batch_topk_over_rows_most_of_which_are_empty():
    n, k = 400, 4
    x, W, _, _ = data(n, 24, 200, seed=5)
    x[np.random.default_rng(6).permutation(n)[: n * 19 // 20]] = 0
    codes = mt.TopKEncoder(W, k=k, activation="batch_topk")(x)
    pre = pre_activations(x, W).ravel()
    chosen = np.argsort(-pre, kind="stable")[: k * n]
    expected = np.zeros_like(pre)
    expected[chosen] = np.maximum(pre[chosen], 0)
    assert len(codes.values) == min(k * n, int((pre > 0).sum()))
    np.testing.assert_allclose(codes.to_dense().ravel(), expected, rtol=1e-6)

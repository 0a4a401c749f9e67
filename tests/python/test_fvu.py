"""FVU: equal to its definition, exact where it must be, right where the mean dwarfs the spread."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import microtome as mt
from microtome import _core
from microtome.errors import DtypeError, NonFiniteError, ShapeError, UndefinedWarning
from microtome.metrics import SparseCodes, features

F32 = np.float32


def definition(x, x_hat):
    """Sum over sum, in float64."""
    x, x_hat = np.asarray(x, np.float64), np.asarray(x_hat, np.float64)
    return ((x - x_hat) ** 2).sum() / ((x - x.mean(0)) ** 2).sum()


def sparse(rng, n=50, k=3, d_sae=20):
    indices = np.argsort(rng.random((n, d_sae)), 1)[:, :k].astype(np.uint32)
    return SparseCodes(indices, rng.random((n, k)).astype(F32), d_sae)


@settings(max_examples=80, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(2, 700), st.integers(1, 40), st.sampled_from([F32, np.float16]))
def test_fvu_equals_its_definition(seed, n, d, dtype):
    rng = np.random.default_rng(seed)
    x, x_hat = (rng.standard_normal((n, d)).astype(dtype) for _ in range(2))
    assert math.isclose(mt.fvu(x, x_hat), definition(x, x_hat), rel_tol=1e-12)


def test_perfect_is_zero_and_the_mean_is_one():
    x = np.random.default_rng(0).standard_normal((1000, 7), dtype=F32)
    assert mt.fvu(x, x) == 0
    assert math.isclose(mt.fvu(x, np.broadcast_to(x.mean(0), x.shape)), 1, rel_tol=1e-6)


@pytest.mark.parametrize("offset", [1e3, 1e6])
def test_a_mean_far_above_the_spread_loses_no_digits(offset):
    rng = np.random.default_rng(1)
    x = (rng.standard_normal((3000, 5)) + offset).astype(F32)
    x_hat = (x + 0.25).astype(F32)
    assert math.isclose(mt.fvu(x, x_hat), definition(x, x_hat), rel_tol=1e-12)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1), st.booleans(), st.booleans())
def test_codes_give_the_fvu_of_their_reconstruction(seed, bias, ragged):
    rng = np.random.default_rng(seed)
    codes = sparse(rng)
    W_dec = rng.standard_normal((20, 9), dtype=F32)
    b_dec = rng.standard_normal(9, dtype=F32) if bias else None
    x = rng.standard_normal((50, 9), dtype=F32)
    x_hat = codes.to_dense().astype(np.float64) @ W_dec + (b_dec if bias else 0)
    found = mt.fvu(x, codes.to_ragged() if ragged else codes, W_dec=W_dec, b_dec=b_dec)
    assert math.isclose(found, definition(x, x_hat), rel_tol=1e-12)


def test_bfloat16_tensors_are_widened_not_rounded():
    torch = pytest.importorskip("torch")
    x, x_hat = torch.randn(200, 16).bfloat16(), torch.randn(200, 16)
    assert math.isclose(mt.fvu(x, x_hat), definition(x.float().numpy(), x_hat.numpy()), rel_tol=1e-12)
    codes = sparse(np.random.default_rng(0), n=200)
    W_dec = torch.randn(20, 16).bfloat16()
    expected = definition(x.float().numpy(), codes.to_dense().astype(np.float64) @ W_dec.double().numpy())
    assert math.isclose(mt.fvu(x, codes, W_dec=W_dec), expected, rel_tol=1e-12)


@pytest.mark.parametrize("value", [0.1, 1e6, 0.0])
def test_rows_without_variance_give_nan_and_say_so(value):
    x = np.full((777, 3), value, F32)
    with pytest.warns(UndefinedWarning, match="for x: it does not vary"):
        assert math.isnan(mt.fvu(x, x + 1))
    with pytest.warns(UndefinedWarning, match="for x: it does not vary"):
        assert math.isnan(mt.fvu(x[:1], x[:1]))


def test_an_undefined_fraction_is_said_where_it_was_asked_for():
    with pytest.warns(UndefinedWarning) as caught:
        mt.fvu(np.ones((5, 3), F32), np.ones((5, 3), F32))
    assert caught[0].filename == __file__


class InBlocks(SparseCodes):
    """Codes in memory that are read block by block, as those of a store."""

    def blocks(self):
        raise NotImplementedError


def test_a_refused_row_of_stored_codes_is_counted_from_a_row_that_is_said(monkeypatch):
    monkeypatch.setattr(features, "STORED_BLOCK_ROWS", 1)
    n = 2 * _core.FVU_BLOCK_ROWS
    some = sparse(np.random.default_rng(0), n)
    x = np.random.default_rng(0).standard_normal((n, 9), dtype=F32)
    x[_core.FVU_BLOCK_ROWS + 3, 2] = np.nan
    message = f"NaN at row 3, column 2, counted from row {_core.FVU_BLOCK_ROWS}"
    with pytest.raises(NonFiniteError, match=message):
        mt.fvu(x, InBlocks(some.indices, some.values, 20), W_dec=W)


X = np.random.default_rng(0).standard_normal((50, 9), dtype=F32)
CODES = sparse(np.random.default_rng(0))
W = np.ones((20, 9), F32)


def spoiled(value, row=7):
    x = X.copy()
    x[row, 3] = value
    return x


REFUSALS = {
    "other rows": (lambda: mt.fvu(X, X[:-1]), ShapeError, "x_hat: expected shape (50, 9)"),
    "other width": (lambda: mt.fvu(X, X[:, :-1].copy()), ShapeError, "x_hat"),
    "no rows": (lambda: mt.fvu(X[:0], X[:0]), ShapeError, "no rows selected"),
    "a vector": (lambda: mt.fvu(X[0], X[0]), ShapeError, "x: expected a matrix"),
    "float64": (lambda: mt.fvu(X.astype(float), X), DtypeError, "x: expected float32"),
    "NaN in x": (
        lambda: mt.fvu(spoiled(np.nan), X),
        NonFiniteError,
        "x: expected finite values, found NaN at row 7, column 3",
    ),
    "infinity in x_hat": (
        lambda: mt.fvu(X, spoiled(np.inf)),
        NonFiniteError,
        "x_hat: expected finite values, found inf at row 7",
    ),
    "codes without a decoder": (lambda: mt.fvu(X, CODES), ShapeError, "W_dec"),
    "a decoder without codes": (lambda: mt.fvu(X, X, W_dec=W), ShapeError, "x_hat"),
    "codes of other rows": (
        lambda: mt.fvu(X, CODES[:-1], W_dec=W),
        ShapeError,
        "x_hat: expected codes",
    ),
    "decoder of another width": (
        lambda: mt.fvu(X, CODES, W_dec=W[:, :-1].copy()),
        ShapeError,
        "W_dec: expected shape (20, 9)",
    ),
    "decoder of other features": (lambda: mt.fvu(X, CODES, W_dec=W[:-1]), ShapeError, "W_dec"),
    "bias of another width": (lambda: mt.fvu(X, CODES, W_dec=W, b_dec=np.ones(8, F32)), ShapeError, "b_dec"),
    "NaN in W_dec": (lambda: mt.fvu(X, CODES, W_dec=W * np.nan), NonFiniteError, "W_dec"),
    "NaN in b_dec": (
        lambda: mt.fvu(X, CODES, W_dec=W, b_dec=np.full(9, np.nan, F32)),
        NonFiniteError,
        "b_dec",
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_bad_input_is_refused_by_name(case):
    call, kind, message = REFUSALS[case]
    with pytest.raises(kind) as caught:
        call()
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)

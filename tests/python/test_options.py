"""Options that are whole numbers, flags or memory budgets: what is none is refused by name, before any work."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest

import microtome as mt
from microtome.arguments import flag, parse_bytes, whole
from microtome.errors import DtypeError, ShapeError
from microtome.metrics import (
    Bitset,
    SparseCodes,
    TopKEncoder,
    cka_interval,
    cka_matrix,
    frequency_gap,
    inclusion_rate,
    iou_chance,
    linear_cka,
    match_features,
    minibatch_cka,
    mutual_matches,
    rbf_cka,
    top_n,
    top_samples,
)

X = np.random.default_rng(0).standard_normal((20, 6), dtype=np.float32)
CODES = SparseCodes(np.zeros((4, 1), np.uint32), np.ones((4, 1), np.float32), d_sae=2)
ROWS = {"sample": [0, 0, 1, 1], "position": [0, 1, 0, 1]}
ENCODER = TopKEncoder(np.eye(6, dtype=np.float32), k=2)


def gap(**options):
    return frequency_gap(CODES, ROWS, CODES, ROWS, progress=False, **options)


NOT_WHOLE = [-1, 2.5, 3.0, 2**70, "3", None, True, np.True_, [], [2, 3], np.array([2, 3])]
WHOLE = {
    "top_n(n)": (lambda n: top_n(X, n), "n"),
    "inclusion_rate(n)": (lambda n: inclusion_rate(n, 5), "n"),
    "inclusion_rate(size)": (lambda n: inclusion_rate(10, n), "size"),
    "inclusion_rate(positions)": (lambda n: inclusion_rate(10, 5, n), "positions"),
    "iou_chance(intersection)": (lambda n: iou_chance(10, 3, 3, n), "intersection"),
    "Bitset(n)": (lambda n: Bitset(np.zeros(1, np.uint64), n), "n"),
    "Bitset.from_indices(n)": (lambda n: Bitset.from_indices([1], n), "n"),
    "minibatch_cka(batch)": (lambda n: minibatch_cka([X], batch=n), "batch"),
    "cka_interval(n_resamples)": (lambda n: cka_interval(X, X, n_resamples=n), "n_resamples"),
    "cka_interval(seed)": (lambda n: cka_interval(X, X, seed=n), "seed"),
    "frequency_gap(replicates)": (lambda n: gap(replicates=n), "replicates"),
    "frequency_gap(seed)": (lambda n: gap(seed=n), "seed"),
    "top_samples(n)": (lambda n: top_samples(CODES, ROWS, n), "n"),
    "analyse(top)": (lambda n: mt.analyse(X, ENCODER, top=n), "top"),
    "match_features(k)": (lambda n: match_features(X, X, n), "k"),
    "set_num_threads": (mt.set_num_threads, "n"),
}


@pytest.mark.parametrize("value", NOT_WHOLE, ids=repr)
@pytest.mark.parametrize("entrance", WHOLE)
def test_what_is_no_whole_number_is_refused_by_name(entrance, value):
    call, name = WHOLE[entrance]
    if value is None and name == "intersection":
        return
    with pytest.raises(ShapeError) as caught:
        call(value)
    assert str(caught.value).startswith(f"{name}: expected a whole number")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", [-1, 1e9, 2.5, "a lot", "1.2.3 GiB", None, True, 2**70], ids=repr)
@pytest.mark.parametrize(
    "call",
    [
        lambda b: linear_cka(X, X, memory_budget=b),
        lambda b: cka_matrix([X], memory_budget=b),
        lambda b: minibatch_cka([X], memory_budget=b),
        lambda b: rbf_cka(X, X, memory_budget=b),
        lambda b: cka_interval(X, X, memory_budget=b),
        lambda b: match_features(X, X, memory_budget=b),
        lambda b: mutual_matches(X, X, memory_budget=b),
    ],
)
def test_what_is_no_memory_budget_is_refused_by_name(call, value):
    with pytest.raises(ShapeError, match=r"^memory_budget: expected"):
        call(value)
    call(np.int64(1 << 30))
    call("1 GiB")


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda f: linear_cka(X, X, f), "debiased"),
        (lambda f: cka_matrix([X], debiased=f), "debiased"),
        (lambda f: rbf_cka(X, X, debiased=f), "debiased"),
        (lambda f: gap(shared=f), "shared"),
        (lambda f: top_samples(CODES, ROWS, per_sample=f), "per_sample"),
        (lambda f: match_features(X, X, mutual=f), "mutual"),
    ],
)
def test_what_is_neither_true_nor_false_is_refused_by_name(call, name):
    for value in ("biased", 1, None):
        with pytest.raises(DtypeError, match=f"^{name}: expected True or False, found"):
            call(value)
    call(np.True_)


def test_bounds_are_said():
    with pytest.raises(ShapeError, match=r"seed: expected a whole number of at most 18446744073709551615"):
        gap(seed=2**64)
    with pytest.raises(
        ShapeError, match=r"replicates: expected a whole number of at most 1000000, found 4611"
    ):
        gap(replicates=2**62)
    with pytest.raises(ShapeError, match="n_resamples: expected a whole number of at least 2, found 1"):
        cka_interval(X, X, n_resamples=1)
    gap(seed=2**64 - 1)


def test_numbers_of_numpy_are_welcome():
    assert whole(np.uint8(3), "n") == whole(np.array(3), "n") == 3
    assert type(whole(np.uint8(3), "n")) is int
    assert flag(np.False_, "debiased") is False
    assert parse_bytes(np.int32(5)) == 5
    assert len(top_n(X, np.int16(4))) == 4


@pytest.mark.parametrize("value", ["abc", "-1", "1e3", "", "2.5", "100000"])
def test_a_bad_number_of_threads_in_the_environment_is_refused_at_first_use(value):
    code = """
import microtome as mt
try:
    mt.num_threads()
except mt.errors.ShapeError as error:
    print(error)
"""
    env = os.environ | {"MICROTOME_NUM_THREADS": value}
    out = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True, timeout=60
    )
    assert out.stdout.strip() == (
        f'MICROTOME_NUM_THREADS: expected a whole number from 0 to 4096, found "{value}"'
    )

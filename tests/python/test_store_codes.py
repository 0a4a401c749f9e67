"""Sparse codes beside a store: resumed with the rows they began with, checked whatever else is damaged."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest

import microtome as mt
import stored
from microtome import errors
from stored import HOOK

FACTS = {"k": 2, "d_sae": 16, "dictionary": "abc"}


def some_codes(n: int) -> mt.SparseCodes:
    return mt.SparseCodes(np.ones((n, 2), np.uint32), np.ones((n, 2), np.float32), 16)


@pytest.fixture
def store(tmp_path):
    stored.write(tmp_path / "run")
    return mt.ActivationStore(tmp_path / "run")


def write_some(store, acts, n: int) -> None:
    with store.write_codes("c", acts, **FACTS) as out:
        out.append(some_codes(n))


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (lambda acts: acts.where(pl.col("kind") == "text"), "found row 0 in place of row 1"),
        (lambda acts: acts.take([1, 4, 8]), "found a selection of 3"),
        (lambda acts: acts.take(np.r_[1:300:3, 0:900]), "found row 0 in place of row 301"),
    ],
)
def test_codes_of_other_rows_are_not_mixed_in(store, other, message):
    image = store[HOOK].where(pl.col("kind") == "image")
    write_some(store, image, 120)
    with pytest.raises(errors.StoreError, match=message) as error:
        store.write_codes("c", other(store[HOOK]), **FACTS)
    assert "cannot resume" in str(error.value)
    assert "\n" not in str(error.value)
    # The refusal has let go of the codes, and the selection they began with goes on.
    write_some(store, image, len(image) - 120)
    assert np.array_equal(store.codes("c").row_numbers, image.row_numbers)


def test_a_longer_selection_that_begins_alike_goes_on(store):
    write_some(store, store[HOOK].take(slice(0, 100)), 100)
    with store.write_codes("c", HOOK, **FACTS) as out:
        assert out.n_rows == 100


def test_codes_that_cannot_be_opened_hide_no_other_problem(store):
    write_some(store, store[HOOK], 1000)
    codes, table = store.path / "codes", store.path / "000000" / "samples.parquet"
    table.chmod(0o644)
    table.write_bytes(table.read_bytes()[:-1])
    (found,) = store.verify(progress=False)
    assert "truncated table" in found
    (codes / ".ipynb_checkpoints").mkdir()
    (codes / "killed").mkdir()
    (codes / "killed" / "LOCK").write_text("4711")
    (codes / "a b").mkdir()
    manifest = codes / "c" / "manifest.json"
    manifest.write_bytes(manifest.read_bytes()[:-3])
    assert store.code_names == ["a b", "c", "killed"]
    problems = store.verify(progress=False)
    assert problems[0] == found
    assert [p[:19] for p in problems[1:]] == [
        "codes a b: name: ex",
        "codes c: truncated ",
        "codes killed: not a",
    ]


def test_a_link_in_place_of_codes_is_a_problem(store, tmp_path):
    write_some(store, store[HOOK], 1000)
    manifest = store.path / "codes" / "c" / "manifest.json"
    manifest.rename(tmp_path / "elsewhere")
    manifest.symlink_to(tmp_path / "elsewhere")
    (problem,) = store.verify(progress=False)
    assert problem.startswith("codes c: ")
    assert "not a link" in problem

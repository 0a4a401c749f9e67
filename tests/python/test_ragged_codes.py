"""Ragged codes in a store: written in pieces of any size they are read, counted and ranked as the ones in memory."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

import microtome as mt
import stored
from microtome import errors
from microtome.metrics import RaggedCodes, features, frequency_gap, sample_fires
from microtome.store import StoredRaggedCodes
from microtome.store.codes import StoredColumn, open_codes
from ragged_cases import D_SAE, N, assert_same, some_codes, write
from stored import HOOK


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    path = tmp_path_factory.mktemp("ragged") / "run"
    stored.write(path)
    return mt.ActivationStore(path)


@pytest.fixture(scope="module")
def found(store):
    return write(store, some_codes(), step_rows=90)


# --- what is written is read ---


@st.composite
def cases(draw):
    """Number of entries of each row, sizes of the appends, rows per commit, and a slice, numbers or a mask."""
    counts = draw(st.lists(st.integers(0, 4) | st.just(0), min_size=1, max_size=60))
    n = len(counts)
    places = st.none() | st.integers(-n - 2, n + 2)
    step = st.sampled_from([None, 1, 2, 7, -1, -3])
    rows = st.builds(slice, places, places, step) | st.lists(st.integers(0, n - 1), max_size=30).map(np.array)
    masks = st.lists(st.booleans(), min_size=n, max_size=n).map(np.array)
    sizes = st.lists(st.integers(1, 25), min_size=1, max_size=5)
    return counts, draw(sizes), draw(st.integers(1, 40)), draw(rows | masks), draw(st.integers(1, 61))


@pytest.fixture(scope="module")
def sixty(tmp_path_factory):
    path = tmp_path_factory.mktemp("sixty") / "run"
    stored.write(path, steps=(60,))
    return mt.ActivationStore(path)


@settings(deadline=None, max_examples=100)
@given(cases())
def test_any_codes_in_any_appends_are_read_as_those_in_memory(sixty, case):
    counts, sizes, step_rows, rows, height = case
    rng = np.random.default_rng(sum(counts))
    total = sum(counts)
    codes = RaggedCodes(
        np.append(0, np.cumsum(counts)).astype(np.int64),
        rng.integers(0, 9, total).astype(np.uint32),
        rng.random(total, np.float32) + 1,
        9,
    )
    if not isinstance(rows, slice):
        rows = rows.astype(bool if rows.dtype == bool else np.int64)
    acts = sixty[HOOK].take(slice(0, len(codes)))
    try:
        found = write(sixty, codes, sizes, "any", acts, step_rows=step_rows)
        assert_same(found[:], codes)
        assert_same(found[rows], codes[rows])
        blocks = list(found.blocks(height))
        assert [len(b) for b in blocks] == [len(codes[a : a + height]) for a in range(0, len(codes), height)]
        for block, start in zip(blocks, range(0, len(codes), height), strict=True):
            assert_same(block, codes[start : start + height])
        assert found.verify() == []
        assert np.array_equal(found.indptr, codes.indptr)
        assert np.array_equal(found.fires[:], counts)
    finally:
        shutil.rmtree(sixty.path / "codes" / "any")


def test_codes_say_what_they_are(store, found):
    codes = some_codes()
    assert isinstance(found, StoredRaggedCodes)
    assert repr(found) == f"StoredRaggedCodes({HOOK!r}, n=1000, entries={len(codes.indices)}, d_sae=40)"
    assert (len(found), found.d_sae, found.hook) == (N, D_SAE, HOOK)
    assert found.facts["dictionary"] == "d"
    assert found.facts["store"] == store.fingerprint
    assert found.indices.shape == found.values.shape == codes.indices.shape
    assert found.fingerprint == store.codes("ragged").fingerprint
    assert not hasattr(found, "k")
    assert not hasattr(codes, "k")
    with pytest.raises(errors.ShapeError, match="n: expected at least 1 row per block, found 0"):
        next(found.blocks(0))
    with pytest.raises(errors.ShapeError, match="rows: expected numbers below 1000, found 1000"):
        found[[1000]]


def test_codes_of_a_selection_know_their_rows(store):
    image = store[HOOK].where(pl.col("kind") == "image")
    found = write(store, some_codes(len(image)), name="image", acts=image)
    assert np.array_equal(found.row_numbers, image.row_numbers)


def test_empty_rows_empty_blocks_and_an_empty_store_are_read(store):
    none = RaggedCodes(np.zeros(N + 1, np.int64), np.empty(0, np.uint32), np.empty(0, np.float32), D_SAE)
    found = write(store, none, name="none", step_rows=100)
    assert_same(found[:], none)
    assert mt.feature_stats(found).fires.sum() == 0
    with store.write_codes("nothing", HOOK, d_sae=D_SAE, dictionary="d") as out:
        out.append(none[:0])
    found = store.codes("nothing")
    assert len(found) == len(found[:]) == 0
    assert list(found.blocks()) == found.verify() == []


@pytest.mark.parametrize("backend", ["mmap", "pread", "direct"])
def test_every_backend_gives_the_same_codes(store, found, backend):
    opened = mt.ActivationStore(store.path, "always", backend)
    other = opened.codes("ragged")
    assert other._reader.backend == opened.backend
    assert_same(other[:], some_codes())
    assert_same(other[[700, 3]], some_codes()[np.array([700, 3])])


def test_blocks_and_slices_read_no_more_than_they_give(store, found, monkeypatch):
    codes, longest = some_codes(), []
    read = StoredColumn.__getitem__

    def watched(column, rows):
        values = read(column, rows)
        longest.append(len(values))
        return values

    monkeypatch.setattr(StoredColumn, "__getitem__", watched)
    for block in found.blocks(25):
        assert max(longest) <= max(25, len(block.indices))
        longest.clear()
    steps = 140  # two appends of 70 fill a step of 90 rows or more
    assert_same(found[995:], codes[995:])
    assert max(longest) <= steps


def test_other_tools_read_rows_and_entries(store, found):
    codes, parts = some_codes(), [{}, {}, {}]
    names = ("rows", "rows.entries", HOOK)
    for folder in sorted(p for p in (store.path / "codes" / "ragged").iterdir() if p.is_dir()):
        for part, name in zip(parts, names, strict=True):
            for column, values in load_file(folder / f"{name}.safetensors").items():
                part.setdefault(column, []).append(values)
    rows, entries, values = ({name: np.concatenate(v) for name, v in part.items()} for part in parts)
    assert np.array_equal(rows["row"], np.arange(N))
    assert np.array_equal(rows["fires"], np.diff(codes.indptr))
    assert np.array_equal(entries["indices"], codes.indices)
    assert np.array_equal(values["values"], codes.values)


def test_golden_ragged_codes_of_format_1_open_bit_for_bit():
    path = Path(__file__).parents[1] / "golden" / "v1" / "ragged"
    found = open_codes(path, "always")
    assert found.fingerprint == "c1cbafec"
    assert found.verify() == []
    assert found.indptr.tolist() == [0, 2, 2, 5, 5, 5, 5, 6]
    assert found[:].indices.tolist() == [3, 1, 0, 1, 2, 7]
    assert found[:].values.tolist() == [2.0, 0.5, 4.0, 3.0, 1.0, 0.25]
    assert found.row_numbers.tolist() == [0, 2, 4, 6, 8, 10, 12]


# --- statistics ---


def definition(dense):
    """Firings, sums, sums of squares and maxima of dense codes, in float64."""
    h = dense.astype(np.float64)
    return (h > 0).sum(0), h.sum(0), (h**2).sum(0), h.max(0)


def assert_equal(a, b):
    assert a.n_tokens == b.n_tokens
    assert all(getattr(a, f).tobytes() == getattr(b, f).tobytes() for f in ("fires", "sum", "sum_sq", "max"))


@pytest.fixture(params=[None, 700])
def blocks_of_entries(request, monkeypatch):
    """Stored codes are read in blocks of 512 rows, or of about 700 entries."""
    monkeypatch.setattr(features, "STORED_BLOCK_ROWS", 512)
    if request.param:
        monkeypatch.setattr(features, "STORED_BLOCK_ENTRIES", request.param)


@pytest.mark.usefixtures("blocks_of_entries")
def test_statistics_are_those_of_codes_in_memory_bit_for_bit(store, found):
    codes, acts, kind = some_codes(), store[HOOK], pl.col("kind")
    stats = mt.feature_stats(found)
    assert_equal(stats, mt.feature_stats(codes))
    fires, total, total_sq, largest = definition(codes.to_dense())
    assert np.array_equal(stats.fires, fires)
    assert np.array_equal(stats.max, largest)
    assert np.allclose(stats.sum, total, rtol=1e-12)
    assert np.allclose(stats.sum_sq, total_sq, rtol=1e-12)
    groups, expected = (mt.feature_stats(c, by=kind, rows=acts) for c in (found, codes))
    assert set(groups) == {"text", "image", "video"}
    assert all(group.fires.sum() for group in groups.values())
    for name, group in groups.items():
        assert_equal(group, expected[name])


@pytest.mark.usefixtures("blocks_of_entries")
def test_ranks_reconstructions_and_gaps_are_those_of_codes_in_memory(store, found):
    codes, acts = some_codes(), store[HOOK]
    W_dec = np.random.default_rng(1).standard_normal((D_SAE, 64), dtype=np.float32)
    assert mt.top_samples(found, acts, n=3).equals(mt.top_samples(codes, acts, n=3))
    assert mt.fvu(acts, found, W_dec=W_dec) == mt.fvu(acts, codes, W_dec=W_dec)
    x_hat = codes.to_dense().astype(np.float64) @ W_dec
    x = acts.numpy().astype(np.float64)
    truth = ((x - x_hat) ** 2).sum() / ((x - x.mean(0)) ** 2).sum()
    assert np.isclose(mt.fvu(acts, found, W_dec=W_dec), truth, rtol=1e-6)
    assert np.array_equal(sample_fires(found, acts).fires, sample_fires(codes, acts).fires)
    gap = frequency_gap(found, acts, codes[:500], acts.take(slice(0, 500)), replicates=20)
    assert np.array_equal(
        gap.low, frequency_gap(codes, acts, codes[:500], acts.take(slice(0, 500)), replicates=20).low
    )


def test_long_rows_are_read_fewer_at_a_time(store, found, monkeypatch):
    mean = len(found.indices) / N
    monkeypatch.setattr(features, "STORED_BLOCK_ENTRIES", int(600 * mean))
    assert features.stored_block_rows(found) == 512  # whole blocks of 256 rows
    monkeypatch.setattr(features, "STORED_BLOCK_ENTRIES", 1)
    assert features.stored_block_rows(found) == 256

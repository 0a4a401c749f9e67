"""Statistics that look across rows read stored codes some rows at a time, and give what codes in memory give."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest

import microtome as mt
import stored
from microtome.metrics import SparseCodes, features, frequency_gap, gap, sample_fires
from microtome.store import StoredCodes, StoredRaggedCodes
from ragged_cases import D_SAE, N, some_codes, write
from stored import HOOK

BLOCK = 256


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    path = tmp_path_factory.mktemp("statistics") / "run"
    stored.write(path)
    return mt.ActivationStore(path)


def slots():
    """Two slots per row, the second one often empty."""
    rng = np.random.default_rng(8)
    values = rng.standard_normal((N, 2)).astype(np.float32) + 1
    return SparseCodes(rng.integers(0, D_SAE, (N, 2)).astype(np.uint32), values.clip(0), D_SAE)


@pytest.fixture(scope="module", params=["slots", "ragged"])
def both(request, store):
    """Codes in memory, and the same in a store."""
    if request.param == "ragged":
        return some_codes(), write(store, some_codes(), step_rows=90)
    facts = {"k": 2, "d_sae": D_SAE, "dictionary": "d"}
    with store.write_codes("slots", store[HOOK], step_rows=300, **facts) as out:
        out.append(slots())
    return slots(), store.codes("slots")


@pytest.fixture(autouse=True)
def largest(monkeypatch):
    """Blocks are small; tells how many rows of stored codes were ever read at once."""
    monkeypatch.setattr(features, "STORED_BLOCK_ROWS", BLOCK)
    seen = [0]
    for kind in (StoredCodes, StoredRaggedCodes):
        reads = kind.__getitem__

        def item(self, rows, reads=reads):
            block = reads(self, rows)
            seen[0] = max(seen[0], len(block))
            return block

        monkeypatch.setattr(kind, "__getitem__", item)
    return seen


SAMPLES = {
    "side by side": np.arange(N) // 7,
    "last first": (N - np.arange(N)) // 7,
    "scattered": np.random.default_rng(3).permutation(N) // 7,
    "named": np.char.add("image ", (np.arange(N) // 40).astype(str)),
}


@pytest.mark.parametrize("samples", SAMPLES.values(), ids=SAMPLES)
def test_samples_are_read_some_at_a_time(both, samples, largest):
    codes, found = both
    fires = np.zeros(D_SAE, int)
    for sample in np.unique(samples):
        fires += (codes.to_dense()[samples == sample] > 0).any(0)
    counted = sample_fires(found, {"sample": samples})
    assert counted.fires.tolist() == fires.tolist() == sample_fires(codes, {"sample": samples}).fires.tolist()
    assert counted.n_samples == len(np.unique(samples))
    assert 0 < largest[0] <= BLOCK


def test_a_sample_longer_than_a_block_is_read_as_one(both, largest):
    codes, found = both
    counted = sample_fires(found, {"sample": np.arange(N) // 600})
    assert counted.fires.tolist() == sample_fires(codes, {"sample": np.arange(N) // 600}).fires.tolist()
    assert largest[0] == 600


@pytest.mark.parametrize("span", [1, 200, 1 << 24])
def test_the_gap_is_resampled_span_by_span(both, span, monkeypatch, largest):
    codes, found = both
    monkeypatch.setattr(gap, "SPAN_FIRINGS", span)
    rows = pl.DataFrame({"sample": np.arange(N) // 9})
    held = (codes, rows, codes[: N // 3], rows[: N // 3])
    expected = frequency_gap(*held, replicates=70, seed=4).to_polars()
    assert frequency_gap(found, *held[1:], replicates=70, seed=4).to_polars().equals(expected)
    assert 0 < largest[0] <= BLOCK
    swapped = frequency_gap(held[2], held[3], found, rows, replicates=70, seed=4).gap
    assert np.array_equal(swapped, -expected["frequency_gap"].to_numpy())


def test_fvu_of_stored_codes_copies_no_rows(store, both, monkeypatch):
    codes, found = both
    W_dec = np.random.default_rng(1).standard_normal((D_SAE, 64), dtype=np.float32)
    acts = store[HOOK].take(np.random.default_rng(2).permutation(N))
    expected = mt.fvu(acts, codes, W_dec=W_dec)
    monkeypatch.setattr(mt.Activations, "__getitem__", None)
    assert mt.fvu(acts, found, W_dec=W_dec) == expected


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int64, np.uint64])
def test_row_numbers_may_be_of_any_integer_type(store, both, dtype):
    rows = np.array([3, 0, 99], dtype)
    assert (store[HOOK][rows] == store[HOOK][[3, 0, 99]]).all()
    assert np.array_equal(both[1][rows].to_dense(), both[0].to_dense()[[3, 0, 99]])
    if dtype == np.int8:
        assert np.array_equal(both[1][np.array([-1], dtype)].to_dense(), both[0].to_dense()[-1:])


def test_a_dense_stretch_of_ragged_codes_is_read_in_smaller_blocks(store, monkeypatch):
    counts = np.where(np.arange(N) // 256 == 1, 30, 1)
    indices = np.concatenate([np.arange(count) for count in counts]).astype(np.uint32)
    values = np.ones(len(indices), np.float32)
    codes = mt.metrics.RaggedCodes(np.append(0, np.cumsum(counts)), indices, values, D_SAE)
    found = write(store, codes, name="dense")
    monkeypatch.setattr(features, "STORED_BLOCK_ROWS", 1024)
    monkeypatch.setattr(features, "STORED_BLOCK_ENTRIES", 600)
    blocks = list(features.code_blocks(found))
    assert [(span.start, span.stop) for span, _ in blocks] == [(0, 256), (256, 512), (512, N)]
    assert np.array_equal(np.concatenate([block[1] for _, block in blocks]), indices)
    assert np.array_equal(mt.feature_stats(found).fires, mt.feature_stats(codes).fires)

"""Ragged codes in a store: written in pieces of any size they are read, counted and ranked as the ones in memory."""

from __future__ import annotations

import re
import shutil
from contextlib import closing
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

import microtome as mt
import stored
from microtome import _core, errors
from microtome.metrics import RaggedCodes, features, frequency_gap, sample_fires
from microtome.store import StoredRaggedCodes
from microtome.store.codes import StoredColumn, open_codes
from stored import HOOK

D_SAE = 40
N = 1000


def some_codes(n: int = N, seed: int = 0, most: int = 6, d_sae: int = D_SAE) -> RaggedCodes:
    """Rows of 0 to ``most`` entries, every feature at most once in a row; rows 100 to 299 are empty."""
    rng = np.random.default_rng(seed)
    counts = rng.integers(0, most + 1, n)
    counts[100:300] = 0
    indices = [rng.permutation(d_sae)[:count] for count in counts]
    flat = np.concatenate([np.empty(0, np.int64), *indices]).astype(np.uint32)
    return RaggedCodes(np.append(0, np.cumsum(counts)), flat, rng.random(len(flat), np.float32) + 0.1, d_sae)


def assert_same(found: RaggedCodes, codes: RaggedCodes):
    for field in ("indptr", "indices", "values"):
        assert np.array_equal(getattr(found, field), getattr(codes, field)), field
    assert (found.values.dtype, found.indices.dtype, found.d_sae) == (np.float32, np.uint32, codes.d_sae)


def write(store: mt.ActivationStore, codes: RaggedCodes, sizes=(70,), name="ragged", acts=HOOK, **options):
    """Write ``codes`` in appends of these sizes, in turn."""
    with store.write_codes(name, acts, d_sae=codes.d_sae, dictionary="d", **options) as out:
        turn = 0
        while out.n_rows < len(codes):
            out.append(codes[out.n_rows : out.n_rows + sizes[turn % len(sizes)]])
            turn += 1
    return store.codes(name)


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
    other = open_codes(store.path / "codes" / "ragged", "always", backend)
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


# --- what is refused ---


def test_slots_and_ragged_rows_are_not_mixed(store):
    slots = mt.SparseCodes(np.zeros((5, 2), np.uint32), np.ones((5, 2), np.float32), D_SAE)
    with store.write_codes("ragged-only", HOOK, d_sae=D_SAE, dictionary="d") as out:
        message = (
            r"codes: expected RaggedCodes, as k=None says, found SparseCodes\(n=5, k=2, d_sae=40\). Pass k=2"
        )
        with pytest.raises(errors.ShapeError, match=message):
            out.append(slots)
        out.append(some_codes(5))
    with store.write_codes("slots-only", HOOK, k=2, d_sae=D_SAE, dictionary="d") as out:
        message = r"codes: expected SparseCodes with k=2, found RaggedCodes\(n=5, .*\). Pass k=None"
        with pytest.raises(errors.ShapeError, match=message):
            out.append(some_codes(5))
        out.append(slots)
    for name, k in (("ragged-only", 2), ("slots-only", None)):
        with pytest.raises(errors.StoreError, match='cannot resume: fact "kind"'):
            store.write_codes(name, HOOK, k=k, d_sae=D_SAE, dictionary="d")


def test_refused_codes_leave_rows_and_entries_in_step(store):
    codes = some_codes(10, seed=1)
    poisoned = RaggedCodes(codes.indptr, codes.indices, codes.values.copy(), D_SAE)
    poisoned.values[3] = np.nan
    with store.write_codes("refused", HOOK, d_sae=D_SAE, dictionary="d") as out:
        out.append(codes)
        with pytest.raises(errors.NonFiniteError, match="1 NaN or infinite"):
            out.append(poisoned)
        with pytest.raises(errors.ShapeError, match="d_sae 40, found 41"):
            out.append(some_codes(10, d_sae=41))
        with pytest.raises(errors.ShapeError, match="1000 rows in all, found 1010"):
            out.append(some_codes(1000))
        assert out.n_rows == 10
        out.append(codes)
    found = store.codes("refused")
    assert len(found) == 20
    assert_same(found[10:], codes)
    assert found.verify() == []


def test_core_refuses_counts_that_are_not_those_of_the_entries(tmp_path):
    with closing(_core.CodesWriter(str(tmp_path / "c"), hook="h", k=None, facts="{}")) as writer:
        rows, fires = np.arange(2, dtype=np.uint64), np.array([1, 2], np.uint32)
        three = np.ones(3, np.uint32), np.ones(3, np.float32)
        for wrong in (
            (rows, fires, three[0][:2], three[1]),
            (rows, fires, three[0], three[1][:2]),
            (rows, fires[:1], *three),
            (rows[:1], fires, *three),
            (rows, fires, three[0], np.ones(6, np.float32)[::2]),
        ):
            with pytest.raises(errors.ShapeError):
                writer.append_ragged(*wrong)
        with pytest.raises(
            errors.ShapeError, match="codes: expected as many entries per row as fired, found slots"
        ):
            writer.append(rows, np.ones((2, 1), np.uint32), np.ones((2, 1), np.float32))
        writer.append_ragged(rows, fires, *three)
        writer.commit()
        assert writer.n_rows == 2


def test_another_store_is_not_taken_for_codes(store, tmp_path):
    with pytest.raises(errors.StoreError, match=r"not sparse codes: .* expected indices and values, found x"):
        open_codes(store.path)


def crc32c(data: bytes) -> int:
    """Definition: the Castagnoli polynomial, reflected, bit by bit."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def swap_rows(path: Path, other: Path):
    """Put the row table of ``other`` in place of that of ``path``, and all checksums right."""
    name = "rows.safetensors"
    file = path / "000000" / name
    file.unlink()
    shutil.copy(other / "000000" / name, file)
    texts = [(folder / "manifest.json").read_text() for folder in (path, other)]
    sums = [re.search(rf'"{name}","bytes":\d+,"crc32c":"(\w+)"', text).group(1) for text in texts]
    text = texts[0].replace(sums[0], sums[1])
    body, end = text[: text.rindex(': "') + 3], text[text.rindex(': "') + 11 :]
    (path / "manifest.json").write_text(f"{body}{crc32c(body.encode()):08x}{end}")


def test_rows_out_of_step_with_entries_are_found(store, tmp_path):
    fewer, more = some_codes(60, most=3), some_codes(60, most=6)
    ends = [int(codes.indptr[-1]) for codes in (fewer, more)]
    for name, codes in (("fewer", fewer), ("more", more)):
        write(store, codes, name=name, acts=store[HOOK].take(slice(0, 60)))
        shutil.copytree(store.path / "codes" / name, tmp_path / name)
    swap_rows(tmp_path / "fewer", store.path / "codes" / "more")
    swap_rows(tmp_path / "more", store.path / "codes" / "fewer")
    found = open_codes(tmp_path / "fewer")
    assert found.verify() == [f"step 000000: expected {ends[0]} entries, found rows with {ends[1]}"]
    with pytest.raises(errors.StoreError, match=f"out of step: .* expected {ends[1]} entries at row 60"):
        found[:]
    found = open_codes(tmp_path / "more")
    assert found.verify() == [f"step 000000: expected {ends[1]} entries, found rows with {ends[0]}"]


def test_blocks_of_the_entries_are_checked_apart_from_those_of_the_rows(tmp_path):
    """Entries fill two blocks of 1 MiB where the counts of their rows fill a part of one."""
    stored.write(tmp_path / "run", steps=(60_000,))
    store = mt.ActivationStore(tmp_path / "run")
    counts = np.arange(60_000) % 11
    total = int(counts.sum())
    flat = np.arange(total)
    codes = RaggedCodes(
        np.append(0, np.cumsum(counts)), (flat % D_SAE).astype(np.uint32), flat.astype(np.float32) + 1, D_SAE
    )
    write(store, codes, sizes=(50_000,), step_rows=60_000)
    shard = store.path / "codes" / "ragged" / "000000" / f"{HOOK}.safetensors"
    shard.chmod(0o644)
    content = bytearray(shard.read_bytes())
    content[4096 + (1 << 20) + 5] ^= 1
    shard.write_bytes(content)
    sound = int(np.searchsorted(codes.indptr, (1 << 20) // 4)) - 1  # rows with all entries in the first block
    found = store.codes("ragged")
    assert_same(found[:sound], codes[:sound])
    with pytest.raises(errors.CorruptShardError, match=f"damaged block 1, rows {(1 << 20) // 4}"):
        found[sound:]
    assert [problem.split(":")[0] for problem in found.verify()] == ["damaged block 1"]


@pytest.mark.parametrize("file", ["rows", "rows.entries", HOOK])
def test_damage_is_named_by_file_and_rows(store, found, tmp_path, file):
    path = shutil.copytree(store.path / "codes" / "ragged", tmp_path / "copy")
    shard = path / "000003" / f"{file}.safetensors"
    shard.chmod(0o644)
    content = bytearray(shard.read_bytes())
    content[4096] ^= 1
    shard.write_bytes(content)
    [problem] = open_codes(path).verify()
    assert problem.startswith("damaged block 0")
    assert f"{file}.safetensors" in problem
    assert_same(open_codes(path)[:400], some_codes()[:400])
    with pytest.raises(errors.CorruptShardError, match="damaged block 0"):
        open_codes(path)[:]

"""Ragged codes that do not fit are refused, and damage and rows out of step with their entries are found."""

from __future__ import annotations

import re
import shutil
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

import microtome as mt
import stored
from microtome import _core, errors
from microtome.metrics import RaggedCodes
from microtome.store.codes import open_codes
from ragged_cases import D_SAE, assert_same, some_codes, write
from stored import HOOK


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    path = tmp_path_factory.mktemp("ragged") / "run"
    stored.write(path)
    return mt.ActivationStore(path)


@pytest.fixture(scope="module")
def found(store):
    return write(store, some_codes(), step_rows=90)


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

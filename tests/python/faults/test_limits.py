"""Limits of the process and of the machine: they are told as what they are, and are no damage of a store."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import microtome as mt
import stored
from microtome import _core, errors
from test_ragged_codes_faults import crc32c

STEPS = 120


@pytest.fixture(scope="module")
def many(tmp_path_factory) -> Path:
    """A sound store of many steps."""
    path = tmp_path_factory.mktemp("many") / "run"
    with _core.StoreWriter(str(path), hooks=[("h", 8, "tokens")], dtype="float32", facts="{}") as writer:
        for step in range(STEPS):
            writer.append("tokens", stored.rows(4, step), {"h": np.full((4, 8), step, np.float32)})
            writer.commit(b"")
    return path


def under_a_limit(store: Path, backend: str, code: str) -> str:
    """What ``code`` prints about ``store`` in a process that may have 100 files open."""
    code = f"""
import resource, sys, warnings
import microtome as mt
warnings.simplefilter("error")
store = mt.ActivationStore({str(store)!r}, backend={backend!r}, on_corrupt={"skip" if "skipped" in code else "error"!r})
mt.ActivationStore({str(store)!r})["h"][:1]
resource.setrlimit(resource.RLIMIT_NOFILE, (100, 100))
{code}
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=100, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("backend", ["mmap", "pread", "direct"])
def test_a_sound_store_of_more_shards_than_files_may_be_open_is_sound(many, backend):
    assert under_a_limit(many, backend, "print(store.verify(progress=False))") == "[]"
    assert under_a_limit(many, backend, "print(len(store['h'].skipped))") == "0"


def test_too_many_open_files_are_an_error_that_says_what_to_do(many):
    text = under_a_limit(
        many,
        "pread",
        """
try:
    store["h"].numpy()
except OSError as error:
    print(error)
held = []
try:
    while True:
        held.append(open("/dev/null"))
except OSError:
    pass
try:
    print(store.verify(progress=False))
except OSError as error:
    print(error)
""",
    )
    read, verified = text.splitlines()
    assert "Too many open files" in read
    assert "ulimit -n" in read
    assert "Too many open files" in verified


def claims_rows(path: Path, n: int) -> mt.Activations:
    """A store whose manifest claims ``n`` rows in the first of two steps, all its numbers and its checksum in order."""
    stored.write(path, steps=(600, 40))
    text = (path / "manifest.json").read_text()
    for file, row in ((f"{stored.HOOK}.safetensors", 256), ("rows.safetensors", 18)):
        columns = -(-row * n // 4) * 4
        size = 4096 + columns + 4 * -(-columns // (1 << 20))
        text = re.sub(rf'("{file}","bytes":)\d+', rf"\g<1>{size}", text, count=1)
    text = text.replace('"tokens":600', f'"tokens":{n}')
    body = text[: text.rindex(': "') + 3]
    (path / "manifest.json").write_text(f'{body}{crc32c(body.encode()):08x}"\n}}\n')
    return mt.ActivationStore(path)[stored.HOOK]


def test_rows_beyond_memory_are_an_error_that_says_what_to_do(tmp_path):
    claimed = claims_rows(tmp_path / "run", 10**13)
    assert len(claimed) == 10**13 + 40
    for read in (lambda: claimed[:], lambda: claimed.row_numbers, claimed.numpy):
        with pytest.raises(MemoryError, match=r"needs \d+ bytes, more than the system gives. Read in blocks"):
            read()


def test_a_manifest_that_claims_any_number_of_rows_costs_no_memory(tmp_path):
    claimed = claims_rows(tmp_path / "run", 10**13)
    for scan in (
        lambda: _core.word_sum(claimed._selection),
        lambda: mt.fvu(claimed, claimed, progress=False),
    ):
        with pytest.raises(errors.CorruptShardError, match="truncated"):
            scan()

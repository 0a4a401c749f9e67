"""Scan of a store with checksums on, as a share of the read bandwidth measured in the same run.

    python benches/python/bench_store.py         # MICROTOME_BENCH_FOLDER: where the store is written

The fold adds up all words, which costs next to nothing, so what is measured is reading. From the page cache it is held to
two plain passes over the same bytes, on one thread as the scan: one that adds up the words of a map, and one that reads
into a buffer that stays in cache (the fastest size of several) and adds them up. From disk, pages dropped before each
round, it is held to a read past the page cache in pieces of 8 MiB, by wall time. A ratio of 1 is the plain read.
"""

from __future__ import annotations

import mmap
import os
import shutil
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import stores
import timing

import microtome as mt
from microtome import _core

HOOK = stores.HOOK
D = 1024
STEP_ROWS = 65_536
STEPS = max(1, int(4 * timing.SCALE))
RUN = 64
BAR = 0.8
DIRECT_BYTES = 8 << 20


def write(path: Path) -> list[Path]:
    """A store of bf16 rows; its shards."""
    rng = np.random.default_rng(timing.SEED)
    x = rng.integers(0, 1 << 15, (STEP_ROWS, D), dtype=np.uint16) & 0x3FFF
    stores.write(path, D, (x for _ in range(STEPS)), RUN)
    return sorted(path.glob(f"*/{HOOK}.safetensors"))


def map_pass(shards: list[Path]) -> Callable[[], Any]:
    """Adds up the words of a fresh map, a mebibyte at a time."""

    def run() -> int:
        total = 0
        for shard in shards:
            with shard.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as data:
                words = np.frombuffer(data, np.uint64)
                total += sum(int(words[i : i + (1 << 17)].sum()) for i in range(0, len(words), 1 << 17))
                del words
        return total

    return run


def read_pass(shards: list[Path], piece: int) -> Callable[[], Any]:
    """Reads into one buffer of ``piece`` bytes and adds up its words."""
    buffer = np.empty(piece // 8, np.uint64)

    def run() -> int:
        total = 0
        for shard in shards:
            with shard.open("rb", buffering=0) as file:
                while (n := file.readinto(buffer)) > 0:
                    total += int(buffer[: n // 8].sum())
        return total

    return run


def direct_pass(shards: list[Path]) -> Callable[[], Any]:
    """Reads past the page cache into one aligned buffer."""
    buffer = mmap.mmap(-1, DIRECT_BYTES)

    def run() -> None:
        for shard in shards:
            file = os.open(shard, os.O_RDONLY | os.O_DIRECT)
            try:
                at = 0
                while (n := os.preadv(file, [buffer], at)) == DIRECT_BYTES:
                    at += n
            finally:
                os.close(file)

    return run


def scan(path: Path, **options: Any) -> Callable[[], Any]:
    """Opens the store and scans its hook: every block is touched for the first time."""
    return lambda: _core.word_sum(mt.ActivationStore(path, **options)[HOOK])


def drop(shards: list[Path]) -> Callable[[], Any]:
    """Drops the pages of the shards from memory."""

    def run() -> None:
        for shard in shards:
            file = os.open(shard, os.O_RDONLY)
            os.fsync(file)
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(file)

    return run


def lines(
    shape: str,
    peer: str,
    scans: dict[str, Callable[[], Any]],
    plain: Callable[[], Any],
    before: Callable[[], Any] = lambda: None,
    clock: str = "",
) -> list[dict[str, Any]]:
    """One line per scan against one plain read, all in turn."""
    found = timing.alternate({**scans, "plain": plain}, before=before)
    return [
        timing.line(name, shape, peer, found[name], found["plain"], bar=BAR, clock=clock) for name in scans
    ]


def rows() -> list[dict[str, Any]]:
    """The table of this file."""
    timing.refuse_debug()
    mt.set_num_threads(timing.THREADS)
    folder = Path(tempfile.mkdtemp(dir=os.environ.get("MICROTOME_BENCH_FOLDER")))
    try:
        return measure(folder / "store")
    finally:
        shutil.rmtree(folder)


def from_memory(path: Path, shards: list[Path], shape: str) -> list[dict[str, Any]]:
    """Lines from the page cache."""
    verified = mt.ActivationStore(path)[HOOK]
    half = verified.where(pl.col("sample") % 2 == 0)
    scans = {
        "scan, checksums on": scan(path),
        "scan, checked before": partial(_core.word_sum, verified),
        "scan, pread": scan(path, backend="pread"),
    }
    pieces = {str(size): read_pass(shards, size) for size in (64 << 10, 128 << 10, 1 << 20)}
    spent = {name: min(t.cpu for t in found) for name, found in timing.alternate(pieces, 2).items()}
    best = min(spent, key=spent.__getitem__)
    table = lines(shape, "sum over a map", scans, map_pass(shards))
    table += lines(shape, f"read(2) of {int(best) >> 10} KiB, sum", scans, pieces[best])
    chosen = {f"half of the rows, runs of {RUN}": partial(_core.word_sum, half)}
    return table + lines(shape, "sum over a map of all", chosen, map_pass(shards))


def from_disk(path: Path, shards: list[Path], shape: str) -> list[dict[str, Any]]:
    """Lines from disk. Nothing maps the shards between rounds, so their pages can be dropped."""
    scans = {"scan, checksums on": scan(path), "scan, direct": scan(path, backend="direct")}
    return lines(shape, "read past the page cache", scans, direct_pass(shards), drop(shards), "wall")


def measure(path: Path) -> list[dict[str, Any]]:
    """All lines over the store at ``path``, which is written first."""
    shards = write(path)
    shape = f"{STEPS * STEP_ROWS} x {D} bf16"
    sums = {_core.word_sum(mt.ActivationStore(path, backend=b)[HOOK]) for b in ("mmap", "pread", "direct")}
    assert len(sums) == 1
    return from_memory(path, shards, f"{shape}, page cache") + from_disk(path, shards, f"{shape}, disk")


if __name__ == "__main__":
    timing.show(rows())

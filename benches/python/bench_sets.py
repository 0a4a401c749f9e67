"""Circuit sets against NumPy booleans, and the exact chance level against sampling.

    python benches/python/bench_sets.py

Both sides alternate in one process with the same number of threads; a ratio above 1 means that microtome is faster.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

import microtome as mt
from microtome import _core
from microtome.metrics import Bitset, top_n

THREADS = int(os.environ.get("MICROTOME_NUM_THREADS", "1"))
REPEATS = int(os.environ.get("MICROTOME_BENCH_REPEATS", "5"))
SCALE = float(os.environ.get("MICROTOME_BENCH_SCALE", "1"))
SEED = int(os.environ.get("MICROTOME_BENCH_SEED", "0"))
# With one thread, CPU time: other processes do not disturb it.
CLOCK = time.process_time if THREADS == 1 else time.perf_counter
DRAWS = 1000


def compare(
    name: str,
    shape: str,
    peer: str,
    ours: Callable[[], Any],
    theirs: Callable[[], Any],
    *,
    inner: int = 1,
    tolerance: float = 1e-12,
    share: float = 1.0,
) -> dict[str, Any]:
    """Their time over our time in alternating runs, one row of the table; both must give the same numbers.

    Ours runs ``inner`` times per measurement; theirs does ``share`` of the work that its result stands for.
    """
    assert np.allclose(np.asarray(ours()), np.asarray(theirs()), atol=tolerance, rtol=0), name
    ratios = []
    for _ in range(REPEATS):
        begin = CLOCK()
        for _ in range(inner):
            ours()
        mine = (CLOCK() - begin) / inner
        begin = CLOCK()
        theirs()
        ratios.append((CLOCK() - begin) / share / mine)
    median = statistics.median(ratios)
    return {
        "name": name,
        "shape": shape,
        "peer": peer,
        "ratio": median,
        "min": min(ratios),
        "max": max(ratios),
    }


def numpy_iou(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.logical_and(a, b).sum() / np.logical_or(a, b).sum())


def numpy_top_n(scores: np.ndarray, n: int) -> np.ndarray:
    return np.sort(np.argpartition(scores, len(scores) - n)[len(scores) - n :])


def sampled_iou(n: int, size_a: int, size_b: int, draws: int) -> float:
    """Chance level as usually done: circuits drawn at random, here without building the second one."""
    rng = np.random.default_rng(SEED)
    ious = []
    for _ in range(draws):
        shared = int((rng.permutation(n)[:size_b] < size_a).sum())
        ious.append(shared / (size_a + size_b - shared))
    return float(np.mean(ious))


def rows() -> list[dict[str, Any]]:
    """The table of this file."""
    if _core.BUILD_PROFILE != "release":
        raise SystemExit("bench_sets: expected a release build, found a debug build. Build with make build")
    mt.set_num_threads(THREADS)
    rng = np.random.default_rng(SEED)
    n = int(1e8 * SCALE)
    scores = rng.random(n, dtype=np.float32)
    mask_a, mask_b = scores > 0.93, rng.random(n, dtype=np.float32) > 0.85
    a, b = Bitset.from_mask(mask_a), Bitset.from_mask(mask_b)
    table = [
        compare(
            "Bitset.iou",
            f"{n:.0e} nodes",
            "numpy bool",
            partial(a.iou, b),
            partial(numpy_iou, mask_a, mask_b),
            inner=5,
        )
    ]
    wanted = n // 100 * 7
    threshold = np.sort(scores)[n - wanted]
    scores[scores == threshold] = (
        threshold  # equal scores are broken by index in ours and at random in theirs
    )
    ours, theirs = partial(top_n, scores, wanted), partial(numpy_top_n, scores, wanted)
    begin = CLOCK()
    chosen = theirs()
    partition = CLOCK() - begin
    assert scores[ours()].sum(dtype=np.float64) == scores[chosen].sum(dtype=np.float64)
    ratios = []
    for _ in range(REPEATS):
        begin = CLOCK()
        ours()
        ratios.append(partition / (CLOCK() - begin))
    table.append(
        {
            "name": "top_n",
            "shape": f"7 % of {n:.0e} scores",
            "peer": "numpy argpartition",
            "ratio": statistics.median(ratios),
            "min": min(ratios),
            "max": max(ratios),
        }
    )
    nodes, share = 1_000_000, 5 / DRAWS
    size_a, size_b = 70_000, 150_000
    table.append(
        compare(
            "expected_iou",
            f"{nodes:.0e} nodes",
            f"{DRAWS} random circuits",
            partial(mt.expected_iou, nodes, size_a, size_b),
            partial(sampled_iou, nodes, size_a, size_b, 5),
            inner=20,
            tolerance=1e-2,
            share=share,
        )
    )
    return table


if __name__ == "__main__":
    for row in rows():
        print("{name:16} {shape:36} {peer:20} {ratio:10.2f} ({min:.2f} to {max:.2f})".format(**row))

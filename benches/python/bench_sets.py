"""Circuit sets against NumPy booleans and SimSIMD, and the exact chance level against sampling.

    python benches/python/bench_sets.py

Both sides alternate in one process with the same number of threads; a ratio above 1 means that microtome is faster.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import simsimd
import timing

import microtome as mt
from microtome.metrics import Bitset, top_n

DRAWS = 1000


def numpy_iou(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.logical_and(a, b).sum() / np.logical_or(a, b).sum())


def simsimd_iou(a: np.ndarray, b: np.ndarray) -> float:
    """Of packed bits."""
    return 1.0 - float(simsimd.jaccard(a, b, "bin8"))


def numpy_top_n(scores: np.ndarray, n: int) -> np.ndarray:
    return np.sort(np.argpartition(scores, len(scores) - n)[len(scores) - n :])


def sampled_iou(n: int, size_a: int, size_b: int, draws: int) -> float:
    """Chance level as usually done: circuits drawn at random, here without building the second one."""
    rng = np.random.default_rng(timing.SEED)
    ious = []
    for _ in range(draws):
        shared = int((rng.permutation(n)[:size_b] < size_a).sum())
        ious.append(shared / (size_a + size_b - shared))
    return float(np.mean(ious))


def rows() -> list[dict[str, Any]]:
    """The table of this file."""
    timing.refuse_debug()
    mt.set_num_threads(timing.THREADS)
    rng = np.random.default_rng(timing.SEED)
    n = int(1e8 * timing.SCALE)
    scores = rng.random(n, dtype=np.float32)
    mask_a, mask_b = scores > 0.93, rng.random(n, dtype=np.float32) > 0.85
    a, b = Bitset.from_mask(mask_a), Bitset.from_mask(mask_b)
    name, shape, ours = "Bitset.iou", f"{n:.0e} nodes", partial(a.iou, b)
    numpy, packed = partial(numpy_iou, mask_a, mask_b), (np.packbits(mask_a), np.packbits(mask_b))
    table = [
        timing.compare(name, shape, "numpy bool", ours, numpy, inner=5, bar=20, atol=1e-12),
        timing.compare(
            name, shape, "SimSIMD jaccard", ours, partial(simsimd_iou, *packed), inner=5, atol=1e-12
        ),
    ]
    wanted = n // 100 * 7
    ours, theirs = partial(top_n, scores, wanted), partial(numpy_top_n, scores, wanted)
    # Equal scores are broken by index in ours and at random in theirs, so the sums are compared.
    assert scores[ours()].sum(dtype=np.float64) == scores[theirs()].sum(dtype=np.float64)
    shape = f"7 % of {n:.0e} scores"
    table.append(timing.compare("top_n", shape, "numpy argpartition", ours, theirs))
    # One read of the scores is what no selection can do without.
    table.append(timing.compare("top_n", shape, "one read of the scores (max)", ours, scores.max))
    nodes, share = 1_000_000, 5 / DRAWS
    size_a, size_b = 70_000, 150_000
    table.append(
        timing.compare(
            "expected_iou",
            f"{nodes:.0e} nodes",
            f"{DRAWS} random circuits",
            partial(mt.expected_iou, nodes, size_a, size_b),
            partial(sampled_iou, nodes, size_a, size_b, 5),
            inner=20,
            bar=1000,
            atol=1e-2,
            share=share,
        )
    )
    return table


if __name__ == "__main__":
    timing.show(rows())

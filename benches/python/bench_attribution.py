"""Attribution with integrated gradients against the plain forwards that it must cost.

    python benches/python/bench_attribution.py

The yardstick is (2 + 3 · steps) plain forwards of a pair: the counterfactual, the clean prompt, and a forward and a
backward, counted as two forwards, for every point. Both sides alternate in one process. The ratio is a cost: what
attribution takes over what the yardstick takes; at the bar of 1.3 or below it is fast enough.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

import microtome as mt
from microtome import organism
from microtome.circuits import PairSet, prepare

THREADS = int(os.environ.get("MICROTOME_NUM_THREADS", "1"))
REPEATS = int(os.environ.get("MICROTOME_BENCH_REPEATS", "5"))
SCALE = float(os.environ.get("MICROTOME_BENCH_SCALE", "1"))
STEPS = 5
BAR = 1.3
# With one thread, CPU time: other processes do not disturb it.
CLOCK = time.process_time if THREADS == 1 else time.perf_counter


def forwards(model: Any, pairs: PairSet, batch_size: int, n: int) -> None:
    """``n`` plain forwards of every pair's clean prompt, in batches."""
    with torch.no_grad():
        for batch in pairs.batches(batch_size, model.device):
            for _ in range(n):
                model(**batch.clean, use_cache=False)


def compare(name: str, shape: str, ours: Callable[[], Any], theirs: Callable[[], Any]) -> dict[str, Any]:
    """Our time over the yardstick's in alternating runs, one row of the table."""
    ours()
    theirs()
    ratios = []
    for _ in range(REPEATS):
        spent = []
        for run in (ours, theirs):
            begin = CLOCK()
            run()
            spent.append(CLOCK() - begin)
        ratios.append(spent[0] / spent[1])
    return {
        "name": name, "shape": shape, "peer": "(2 + 3 steps) plain forwards (cost)",
        "ratio": statistics.median(ratios), "min": min(ratios), "max": max(ratios), "bar": BAR,
    }  # fmt: skip


def rows() -> list[dict[str, Any]]:
    """The table of this file."""
    torch.set_num_threads(THREADS)
    model, processor = organism.load_model(), organism.load_processor()
    made = []
    for form in ("visual", "textual"):
        n = max(4, int(16 * SCALE))
        pairs = prepare(model, processor, organism.pairs("counting", form, n))
        for batch_size in (1, 8):

            def ours(pairs: PairSet = pairs, batch_size: int = batch_size) -> Any:
                return mt.attribute(model, pairs, "ig", STEPS, batch_size=batch_size, progress=False)

            def theirs(pairs: PairSet = pairs, batch_size: int = batch_size) -> None:
                forwards(model, pairs, batch_size, 2 + 3 * STEPS)

            shape = f"organism, {len(pairs)} {form} pairs, {pairs.n_slots} tokens, batch {batch_size}"
            made.append(compare("attribution (IG)", shape, ours, theirs))
    return made


if __name__ == "__main__":
    for row in rows():
        print(row)

"""Training from a store against the bare step on a tensor in memory, and what share of it is spent waiting for rows.

    python benches/python/bench_training.py

Both sides take the same steps of the same objective with the same optimiser. ``train_sae`` reads its batches from a mapped
store in shuffled order; the other cycles through batches that lie ready in memory. They alternate in one process; the ratio
is their time over ours, so 1 is the best there is. ``wait`` is the share of the run in which the optimiser stood still.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import stores
import torch

import microtome as mt
from microtome import _core
from microtome.dictionary import TrainConfig
from microtome.dictionary.train import run as training
from microtome.dictionary.train.data import RowSource
from microtome.dictionary.train.start import start

SCALE = float(os.environ.get("MICROTOME_BENCH_SCALE", "1"))
SEED = int(os.environ.get("MICROTOME_BENCH_SEED", "0"))
REPEATS = int(os.environ.get("MICROTOME_BENCH_REPEATS", "3"))
STEPS = 12
BAR = 0.05
"""Largest share of the time that may be spent waiting for rows."""


def store_of(folder: Path, n: int, d: int) -> mt.Activations:
    """A store of ``n`` Gaussian rows in bfloat16, in samples of 128 tokens."""
    rng = np.random.default_rng(SEED)

    def block(rows: int) -> np.ndarray:
        x = torch.from_numpy(rng.standard_normal((rows, d), dtype=np.float32)).bfloat16()
        return x.view(torch.uint16).numpy()

    stores.write(folder, d, (block(min(16_384, n - first)) for first in range(0, n, 16_384)), per_sample=128)
    return mt.ActivationStore(folder)[stores.HOOK]


def bare_seconds(acts: mt.Activations, config: TrainConfig) -> float:
    """Time of the same steps on batches that lie in memory."""
    source = RowSource(acts)
    rows = np.arange(source.n)
    begun = start(source, rows, config, None, {})
    run = training._Run(begun, config, STEPS, source.read(rows[:64]), 1)
    batches = [source.read(np.sort(part)) for part in np.split(rows[: 4 * config.batch_size], 4)]
    began = time.perf_counter()
    for step in range(STEPS):
        run.update(step, batches[step % 4])
    return time.perf_counter() - began


def rows() -> list[dict[str, Any]]:
    """The table of ratios."""
    if _core.BUILD_PROFILE != "release":
        raise SystemExit("benches: expected a release build, found debug. Run make bench")
    torch.set_num_threads(mt.num_threads())
    d, n = 1024, max(int((1 << 16) * SCALE), 1 << 14)
    config = TrainConfig(
        d_sae=8192,
        k=32,
        steps=STEPS,
        batch_size=2048,
        eval_rows=64,
        eval_every=STEPS,
        b_dec_init="zeros",
        seed=SEED,
    )
    ratios, waits = [], []
    with tempfile.TemporaryDirectory() as folder:
        acts = store_of(Path(folder) / "store", n, d)
        for _ in range(REPEATS):
            bare = bare_seconds(acts, config)
            found = training.train_sae(acts, config, progress=False)
            ratios.append(bare / found.seconds)
            waits.append(found.data_wait_share)
    waited = f"waits for rows {statistics.median(waits):.1%} of the time, bar {BAR:.0%}"
    shape = f"d {d}, d_sae 8192, batch 2048, {n} rows; {waited}"
    line = {"name": "SAE training from a store", "shape": shape, "peer": "the same steps on rows in memory"}
    return [
        {**line, "ratio": statistics.median(ratios), "min": min(ratios), "max": max(ratios), "wait": waits}
    ]


if __name__ == "__main__":
    for row in rows():
        print("{name:28} {shape:60} {ratio:6.2f}  ({min:.2f} to {max:.2f})".format(**row))

"""One pass over a store (encode, statistics, top samples, FVU) against the same results one after the other.

    python benches/python/bench_analyse.py        # MICROTOME_BENCH_FOLDER: where the store is written

Separate passes encode all rows, keep the codes, and read the rows again for the FVU; the one pass reads a block of rows,
and forgets its codes. Both give the same numbers, which is checked first. The remark tells what each holds beside its
results at most, by the growth of the process at its peak.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import stores
import timing

import microtome as mt

D, D_SAE, K, TOP = 512, 16_384, 32, 20
ROWS = max(4096, int(32_768 * timing.SCALE))
RUN = 64


def write(path: Path) -> None:
    """A store of bf16 rows around a mean."""
    rng = np.random.default_rng(timing.SEED)
    x = rng.standard_normal((ROWS, D), dtype=np.float32) + np.float32(1)
    stores.write(path, D, [(x.view(np.uint32) >> 16).astype(np.uint16)], RUN)


def sides(path: Path) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """The one pass and the separate ones, each as (firings, FVU, rows of the table of top samples)."""
    rng = np.random.default_rng(timing.SEED)
    W_dec = rng.standard_normal((D_SAE, D), dtype=np.float32) / np.float32(np.sqrt(D))
    encoder = mt.TopKEncoder(W_dec.T.copy(), None, k=K)
    acts = mt.ActivationStore(path)[stores.HOOK]

    def one() -> tuple[int, float, int]:
        found = mt.metrics.analyse(acts, encoder, W_dec=W_dec, by="kind", top=TOP, progress=False)
        return firings(found.stats), found.fvu, len(found.top)

    def separate() -> tuple[int, float, int]:
        codes = encoder(acts, progress=False)
        stats = mt.feature_stats(codes, by="kind", rows=acts.rows)
        top = mt.top_samples(codes, acts.rows, n=TOP, by="kind")
        return firings(stats), mt.fvu(acts, codes, W_dec=W_dec), len(top)

    return one, separate


def firings(stats: dict[Any, Any]) -> int:
    """Firings of all features in all groups."""
    return sum(int(group.fires.sum()) for group in stats.values())


def growth(path: Path, side: int) -> float:
    """MiB that the process grows by at most during one call."""
    call = sides(path)[side]
    before = timing.peak_mib()
    call()
    return timing.peak_mib() - before


def rows() -> list[dict[str, Any]]:
    """The table of this file."""
    timing.refuse_debug()
    mt.set_num_threads(timing.THREADS)
    folder = Path(tempfile.mkdtemp(dir=os.environ.get("MICROTOME_BENCH_FOLDER")))
    try:
        write(folder / "store")
        with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
            held = [pool.apply(growth, (folder / "store", side)) for side in (0, 1)]
        one, separate = sides(folder / "store")
        assert one() == separate()
        shape = f"n {ROWS}, d {D}, d_sae {D_SAE}, k {K}"
        line = timing.compare("encode, statistics, top, FVU", shape, "separate passes", one, separate)
        return [line | {"remarks": f"grows by {held[0]:.0f} MiB, separate passes by {held[1]:.0f}"}]
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    timing.show(rows())

"""Cosines between dictionaries against torch: same index, and exact best matches.

    python benches/python/bench_cosine.py

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
import torch

import microtome as mt
from microtome import _core

THREADS = int(os.environ.get("MICROTOME_NUM_THREADS", "1"))
REPEATS = int(os.environ.get("MICROTOME_BENCH_REPEATS", "5"))
SCALE = float(os.environ.get("MICROTOME_BENCH_SCALE", "1"))
SEED = int(os.environ.get("MICROTOME_BENCH_SEED", "0"))
# With one thread, CPU time: other processes do not disturb it.
CLOCK = time.process_time if THREADS == 1 else time.perf_counter


def compare(
    name: str, shape: str, peer: str, ours: Callable[[], Any], theirs: Callable[[], Any]
) -> dict[str, Any]:
    """Their time over our time in alternating runs, one row of the table; both must give the same numbers."""
    assert np.allclose(np.asarray(ours()), np.asarray(theirs()), atol=1e-5), name
    ratios = []
    for _ in range(REPEATS):
        spent = []
        for run in (ours, theirs):
            begin = CLOCK()
            run()
            spent.append(CLOCK() - begin)
        ratios.append(spent[1] / spent[0])
    median = statistics.median(ratios)
    return {
        "name": name,
        "shape": shape,
        "peer": peer,
        "ratio": median,
        "min": min(ratios),
        "max": max(ratios),
    }


def dictionaries(d_sae: int, d: int, matched: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Two decoders; a share of the features of the second are noisy copies from the first, elsewhere."""
    generator = torch.Generator().manual_seed(SEED)
    a, b = torch.randn(2, d_sae, d, generator=generator)
    n = int(matched * d_sae)
    b[torch.randperm(d_sae, generator=generator)[:n]] += 2 * a[:n]
    return a, b


@torch.no_grad()
def torch_matches(a: torch.Tensor, b: torch.Tensor, chunk: int = 1024) -> torch.Tensor:
    """Best cosine of every row: chunked matrix product and maximum."""
    b = torch.nn.functional.normalize(b)
    parts = [(torch.nn.functional.normalize(x) @ b.T).max(1) for x in a.split(chunk)]
    return torch.cat([part.values for part in parts])


@torch.no_grad()
def torch_same_index(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.cosine_similarity(a, b)


def rows() -> list[dict[str, Any]]:
    """The table of this file."""
    if _core.BUILD_PROFILE != "release":
        raise SystemExit("bench_cosine: expected a release build, found a debug build. Build with make build")
    mt.set_num_threads(THREADS)
    torch.set_num_threads(THREADS)
    table = []
    for d_sae, d, matched in [(8192, 512, 0.7), (16384, 1024, 0.7), (8192, 512, 0.0)]:
        d_sae = int(d_sae * SCALE)
        a, b = dictionaries(d_sae, d, matched)
        shape = f"{d_sae} x {d_sae}, d {d}, {matched:.0%} matched"

        def ours(a: torch.Tensor = a, b: torch.Tensor = b) -> np.ndarray:
            return mt.match_features(a, b).cosines.ravel()

        table.append(
            compare("match_features", shape, "torch matmul, max", ours, partial(torch_matches, a, b))
        )
    a, b = dictionaries(int(65536 * SCALE), 512, 0.5)
    table.append(
        compare(
            "decoder_cosine",
            f"{len(a)} x 512",
            "torch cosine (f32)",
            partial(mt.decoder_cosine, a, b),
            partial(torch_same_index, a, b),
        )
    )
    return table


if __name__ == "__main__":
    for row in rows():
        print("{name:16} {shape:36} {peer:20} {ratio:8.2f} ({min:.2f} to {max:.2f})".format(**row))

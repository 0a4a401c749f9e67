"""Cosines between dictionaries against torch and SimSIMD: same index, and exact best matches.

    python benches/python/bench_cosine.py

Both sides alternate in one process with the same number of threads; a ratio above 1 means that microtome is faster.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import simsimd
import timing
import torch

import microtome as mt


def dictionaries(d_sae: int, d: int, matched: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Two decoders; a share of the features of the second are noisy copies from the first, elsewhere."""
    generator = torch.Generator().manual_seed(timing.SEED)
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


def simsimd_same_index(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return 1.0 - np.asarray(simsimd.cosine(a, b))


def rows() -> list[dict[str, Any]]:
    """The table of this file."""
    timing.refuse_debug()
    mt.set_num_threads(timing.THREADS)
    torch.set_num_threads(timing.THREADS)
    table = []
    for d_sae, d, matched in [(8192, 512, 0.7), (16384, 1024, 0.7), (8192, 512, 0.0)]:
        d_sae = int(d_sae * timing.SCALE)
        a, b = dictionaries(d_sae, d, matched)
        shape = f"{d_sae} x {d_sae}, d {d}, {matched:.0%} matched"

        def ours(a: torch.Tensor = a, b: torch.Tensor = b) -> np.ndarray:
            return mt.match_features(a, b).cosines.ravel()

        table.append(
            timing.compare(
                "match_features",
                shape,
                "torch matmul, max",
                ours,
                partial(torch_matches, a, b),
                bar=4,
                atol=1e-5,
            )
        )
    a, b = dictionaries(int(65536 * timing.SCALE), 512, 0.5)
    ours, shape = partial(mt.decoder_cosine, a, b), f"{len(a)} x 512"
    peers = {
        "torch cosine (f32)": partial(torch_same_index, a, b),
        "SimSIMD cosine (f32)": partial(simsimd_same_index, a.numpy(), b.numpy()),
    }
    for peer, theirs in peers.items():
        table.append(timing.compare("decoder_cosine", shape, peer, ours, theirs, atol=1e-5))
    return table


if __name__ == "__main__":
    timing.show(rows())

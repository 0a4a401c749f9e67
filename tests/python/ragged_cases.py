"""Ragged codes for the tests, and how they are written and compared."""

from __future__ import annotations

import numpy as np

import microtome as mt
from microtome.metrics import RaggedCodes
from stored import HOOK

D_SAE = 40
N = 1000


def some_codes(n: int = N, seed: int = 0, most: int = 6, d_sae: int = D_SAE) -> RaggedCodes:
    """Rows of 0 to ``most`` entries, every feature at most once in a row; rows 100 to 299 are empty."""
    rng = np.random.default_rng(seed)
    counts = rng.integers(0, most + 1, n)
    counts[100:300] = 0
    indices = [rng.permutation(d_sae)[:count] for count in counts]
    flat = np.concatenate([np.empty(0, np.int64), *indices]).astype(np.uint32)
    return RaggedCodes(np.append(0, np.cumsum(counts)), flat, rng.random(len(flat), np.float32) + 0.1, d_sae)


def assert_same(found: RaggedCodes, codes: RaggedCodes):
    for field in ("indptr", "indices", "values"):
        assert np.array_equal(getattr(found, field), getattr(codes, field)), field
    assert (found.values.dtype, found.indices.dtype, found.d_sae) == (np.float32, np.uint32, codes.d_sae)


def write(store: mt.ActivationStore, codes: RaggedCodes, sizes=(70,), name="ragged", acts=HOOK, **options):
    """Write ``codes`` in appends of these sizes, in turn."""
    with store.write_codes(name, acts, d_sae=codes.d_sae, dictionary="d", **options) as out:
        turn = 0
        while out.n_rows < len(codes):
            out.append(codes[out.n_rows : out.n_rows + sizes[turn % len(sizes)]])
            turn += 1
    return store.codes(name)

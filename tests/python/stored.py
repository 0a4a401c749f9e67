"""Small stores for the tests."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import polars as pl

from microtome import _core

HOOK = "blocks.0.hook_resid_post"
TOWER = "vision_encoder.blocks.0.hook_resid_post"
HOOKS = [(HOOK, 64, "tokens"), (TOWER, 3, "vision_encoder")]
FACTS = {"model": "none", "modules": {HOOK: "model.language_model.layers.0"}}
PER_SAMPLE = 20


def rows(n: int, first_sample: int = 0) -> dict[str, np.ndarray]:
    """The row table of ``n`` tokens, twenty per sample, kinds in turn."""
    number = np.arange(n)
    return {
        "sample": (first_sample + number // PER_SAMPLE).astype(np.uint64),
        "position": (number % PER_SAMPLE).astype(np.uint32),
        "token_id": (number * 7 % 1000).astype(np.uint32),
        "kind": (number % 3).astype(np.uint8),
        "special": (number % PER_SAMPLE == 0).astype(np.uint8),
    }


def samples(first: int, n: int) -> bytes:
    """The table of samples, as a parquet file."""
    numbers = np.arange(first, first + n)
    table = pl.DataFrame(
        {
            "sample": numbers.astype(np.uint64),
            "id": [f"s{i}" for i in numbers],
            "domain": [("vqa", "text")[i % 2] for i in numbers],
        }
    )
    out = io.BytesIO()
    table.write_parquet(out)
    return out.getvalue()


def words(x: np.ndarray, dtype: str):
    """Float32 values as the core takes them in ``dtype``; bf16 by truncation."""
    if dtype == "bfloat16":
        return "bfloat16", (x.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    return x.astype(dtype)


def write(path: Path, steps=(600, 400), dtype: str = "float32", seed: int = 0) -> np.ndarray:
    """Write a store and return the activations of :data:`HOOK`, float32 and exact in every dtype."""
    rng = np.random.default_rng(seed)
    # Values of 8 significant bits survive every dtype.
    x = rng.integers(-128, 128, (sum(steps), 64)).astype(np.float32) / 16
    with _core.StoreWriter(str(path), hooks=HOOKS, dtype=dtype, facts=json.dumps(FACTS)) as writer:
        start = 0
        for n in steps:
            first = start // PER_SAMPLE
            writer.append("tokens", rows(n, first), {HOOK: words(x[start : start + n], dtype)})
            writer.append("vision_encoder", rows(5, first), {TOWER: words(x[start : start + 5, :3], dtype)})
            writer.commit(samples(first, n // PER_SAMPLE))
            start += n
    return x

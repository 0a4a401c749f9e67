"""Writes the golden store of format 1. It is never run again: the files beside it are what it wrote."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import polars as pl

import microtome as mt
from microtome import _core

HOOK = "blocks.0.hook_resid_post"
HERE = Path(__file__).parent / "store"


def main() -> None:
    """Ten rows of four bf16 values in two steps, with codes."""
    x = (np.arange(40, dtype=np.float32) / 2 - 8).reshape(10, 4)
    words = (x.view(np.uint32) >> 16).astype(np.uint16)
    facts = json.dumps({"model": "none", "made_by": "tests/golden/v1/make.py"})
    with _core.StoreWriter(str(HERE), hooks=[(HOOK, 4, "tokens")], dtype="bfloat16", facts=facts) as writer:
        for first, n in ((0, 7), (7, 3)):
            number = np.arange(first, first + n)
            rows = {
                "sample": (number // 5).astype(np.uint64),
                "position": (number % 5).astype(np.uint32),
                "token_id": number.astype(np.uint32),
                "kind": (number % 3).astype(np.uint8),
                "special": (number % 5 == 0).astype(np.uint8),
            }
            writer.append("tokens", rows, {HOOK: ("bfloat16", words[first : first + n])})
            samples = io.BytesIO()
            table = {"sample": np.array([first // 5], np.uint64), "id": [f"s{first // 5}"]}
            pl.DataFrame(table).write_parquet(samples)
            writer.commit(samples.getvalue())
    store = mt.ActivationStore(HERE)
    slots = np.tile(np.array([5, 2]), (10, 1))  # (10, k)
    codes = mt.SparseCodes(slots.astype(np.uint32), (slots > 2).astype(np.float32) + 1, 8)
    with store.write_codes("topk", HOOK, k=2, d_sae=8, dictionary="none") as out:
        out.append(codes)


if __name__ == "__main__":
    main()

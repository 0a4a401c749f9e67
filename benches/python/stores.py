"""The stores that benches read: bf16 rows of one hook, a step per block, in samples of equal length."""

from __future__ import annotations

import io
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import polars as pl

from microtome import _core

HOOK = "blocks.0.hook_resid_post"


def write(path: Path, d: int, blocks: Iterable[np.ndarray], per_sample: int) -> None:
    """Write each block of bf16 words, uint16 (n, d), as a step; kinds of tokens take turns.

    Args:
        path: of the store.
        d: width of the blocks.
        blocks: whole samples each.
        per_sample: tokens of a sample.
    """
    first = 0
    with _core.StoreWriter(str(path), hooks=[(HOOK, d, "tokens")], dtype="bfloat16", facts="{}") as out:
        for words in blocks:
            number = np.arange(first, first + len(words))
            rows = {
                "sample": (number // per_sample).astype(np.uint64),
                "position": (number % per_sample).astype(np.uint32),
                "token_id": np.zeros(len(number), np.uint32),
                "kind": (number % 3).astype(np.uint8),
                "special": np.zeros(len(number), np.uint8),
            }
            out.append("tokens", rows, {HOOK: ("bfloat16", words)})
            ids, table = np.unique(rows["sample"]), io.BytesIO()
            pl.DataFrame({"sample": ids, "id": [str(i) for i in ids]}).write_parquet(table)
            out.commit(table.getvalue())
            first += len(words)

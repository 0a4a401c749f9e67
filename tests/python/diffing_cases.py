"""Small stores of chosen activations for the diffing tests."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import polars as pl

import microtome as mt
from microtome import _core

KINDS = {"text": 0, "image": 1}


def write_store(
    path: Path, hooks, tokens, columns, kinds=None, facts=None, token_ids=None
) -> mt.ActivationStore:
    """A store of samples of ``tokens`` rows each; ``kinds`` names the kind of every token of a sample."""
    n = len(next(iter(hooks.values())))
    number = np.arange(n)
    kinds = kinds or ["text"] * tokens
    samples = pl.DataFrame(
        {
            "sample": np.arange(n // tokens).astype(np.uint64),
            "id": [f"s{i}" for i in range(n // tokens)],
            **columns,
        }
    )
    out = io.BytesIO()
    samples.write_parquet(out)
    rows = {
        "sample": (number // tokens).astype(np.uint64),
        "position": (number % tokens).astype(np.uint32),
        "token_id": (number % tokens if token_ids is None else np.asarray(token_ids)).astype(np.uint32),
        "kind": np.array([KINDS[k] for k in kinds], np.uint8)[number % tokens],
        "special": np.zeros(n, np.uint8),
    }
    spec = [(name, x.shape[1], "tokens") for name, x in hooks.items()]
    with _core.StoreWriter(str(path), hooks=spec, dtype="float32", facts=json.dumps(facts or {})) as writer:
        writer.append("tokens", rows, {name: x.astype(np.float32) for name, x in hooks.items()})
        writer.commit(out.getvalue())
    return mt.ActivationStore(path)

"""Exact Top-K encode side by side with torch and faiss: ratios of medians of alternating runs in one process.

torch computes ``topk(relu(x @ W + b))`` with the weights laid out as it likes them best; its bfloat16 is not exact.
faiss is ``IndexFlatIP`` over the features. Everybody gets the same numbers, converted beforehand.

    python benches/python/bench_encode.py        # MICROTOME_BENCH_ROWS, MICROTOME_BENCH_REPEATS, MICROTOME_NUM_THREADS
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import numpy as np
import timing

import microtome as mt
from microtome.metrics import EncodeReport

SHAPES = [(512, 16_384, 32), (2048, 16_384, 50)]
BARS = {"torch float32": 5.0, "faiss IndexFlatIP": 4.0, "torch bfloat16": 1.3}
ROWS = int(os.environ.get("MICROTOME_BENCH_ROWS", "1024"))


def peers(x: np.ndarray, W_enc: np.ndarray, k: int, threads: int) -> dict[str, Callable[[], Any]]:
    """What a user could pick instead; a package that is not installed is left out."""
    import torch

    torch.set_num_threads(threads)
    calls: dict[str, Callable[[], Any]] = {}
    for name, dtype in (("torch float32", torch.float32), ("torch bfloat16", torch.bfloat16)):
        t, W = torch.from_numpy(x).to(dtype), torch.from_numpy(W_enc.T.copy()).to(dtype).T
        calls[name] = lambda t=t, W=W: torch.topk(torch.relu(t @ W), k, sorted=False)
    try:
        import faiss
    except ImportError:
        return calls
    faiss.omp_set_num_threads(threads)
    index = faiss.IndexFlatIP(x.shape[1])
    index.add(np.ascontiguousarray(W_enc.T))
    calls["faiss IndexFlatIP"] = lambda: index.search(x, k)
    return calls


def measure(d: int, d_sae: int, k: int, threads: int) -> list[dict[str, Any]]:
    """One line per peer and certificate at one shape."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((ROWS, d), dtype=np.float32)
    W_enc = rng.standard_normal((d, d_sae), dtype=np.float32) / np.float32(np.sqrt(d))
    encoders = {c: mt.TopKEncoder(W_enc, None, k=k, certificate=c) for c in ("deterministic", "dithered")}
    ours = {name: (lambda e=encoder: e(x, progress=False)) for name, encoder in encoders.items()}
    least_mib = timing.peak_mib()
    encoders["deterministic"](x, progress=False)
    extra_mib = timing.peak_mib() - least_mib
    before = timing.let_threads_rest if threads > 1 else None
    seconds = timing.alternate(ours | peers(x, W_enc, k, threads), before=before)
    lines = []
    for certificate, encoder in encoders.items():
        for peer in BARS:
            if peer not in seconds:
                continue
            report = encoder.last_report
            shape = f"d {d}, d_sae {d_sae}, k {k}, {threads} thread{'s' * (threads > 1)}"
            line = timing.line(
                f"encode ({certificate})",
                shape,
                peer,
                seconds[certificate],
                seconds[peer],
                threads=threads,
                bar=BARS[peer],
            )
            lines.append(line | {"remarks": f"{remarks(report)}; {extra_mib:.0f} MiB"})
    return lines


def remarks(report: EncodeReport) -> str:
    """What the screen left to score, how often it gave up, and where the time went."""
    whole = sum(report.seconds.values())
    shares = ", ".join(f"{phase} {spent / whole:.0%}" for phase, spent in report.seconds.items())
    return (
        f"{report.screen}; {report.candidates_per_k:.2f} candidates per k, {report.misjudged_rate:.2%} of rows "
        f"misjudged, {report.escape_rate:.2%} escaped; {shares}"
    )


def rows() -> list[dict[str, Any]]:
    """All lines, for one thread and for all."""
    timing.refuse_debug()
    everything = []
    usual = mt.num_threads()
    for threads in sorted({1, usual}):
        mt.set_num_threads(threads)
        for shape in SHAPES:
            everything += measure(*shape, threads)
    mt.set_num_threads(usual)
    return everything


if __name__ == "__main__":
    timing.show(rows())

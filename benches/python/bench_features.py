"""Feature statistics, top samples and FVU from codes against torch, and against counting over dense codes.

    python benches/python/bench_features.py

Both sides alternate in one process with the same number of threads; a ratio above 1 means that microtome is faster.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import timing
import torch

import microtome as mt
from microtome.metrics import SparseCodes


def codes_of(n: int, k: int, d_sae: int, skewed: bool) -> SparseCodes:
    """Random codes: features uniform, or k of them frequent and the rest with a heavy tail; distinct within a row."""
    rng = np.random.default_rng(timing.SEED)
    tail = rng.zipf(1.2, (n, k)) % (d_sae // k) * k + np.arange(k)
    indices = rng.permutation(d_sae // k * k)[tail] if skewed else rng.integers(0, d_sae, (n, k))
    values = rng.standard_exponential((n, k), dtype=np.float32) + np.float32(0.01)
    return SparseCodes(indices.astype(np.uint32), values, d_sae)


def torch_statistics(indices: torch.Tensor, values: torch.Tensor, d_sae: int) -> Callable[[], Any]:
    """The outputs of feature_stats: bincount, scatter_add in float64, scatter_reduce for maxima."""
    flat, h = indices.flatten(), values.flatten()

    def run() -> tuple[torch.Tensor, ...]:
        wide = h.double()
        zeros = torch.zeros(d_sae, dtype=torch.float64)
        return (
            torch.bincount(flat, minlength=d_sae),
            zeros.clone().scatter_add_(0, flat, wide),
            zeros.scatter_add_(0, flat, wide * wide),
            torch.zeros(d_sae).scatter_reduce_(0, flat, h, "amax"),
        )

    return run


def nonzero_counts(indices: torch.Tensor, values: torch.Tensor, d_sae: int) -> Callable[[], Any]:
    """Counts as feature caches take them: dense codes of a batch, their non-zero entries, a count each."""
    rows = 512

    def run() -> torch.Tensor:
        counts = torch.zeros(d_sae, dtype=torch.int64)
        for start in range(0, len(indices), rows):
            batch = slice(start, start + rows)
            dense = torch.zeros(len(indices[batch]), d_sae).scatter_(1, indices[batch], values[batch])
            active = torch.nonzero(dense.abs() > 1e-5)  # (entries, 2)
            counts += torch.bincount(active[:, 1], minlength=d_sae)
        return counts

    return run


def torch_fvu(
    x: torch.Tensor, indices: torch.Tensor, values: torch.Tensor, decoder: torch.Tensor
) -> Callable[[], Any]:
    """embedding_bag, then the two sums."""

    def run() -> float:
        x_hat = torch.nn.functional.embedding_bag(indices, decoder, per_sample_weights=values, mode="sum")
        error = (x - x_hat).square().sum(dtype=torch.float64)
        return float(error / (x - x.mean(0)).square().sum(dtype=torch.float64))

    return run


def torch_top(indices: torch.Tensor, values: torch.Tensor, samples: np.ndarray, n: int) -> Callable[[], Any]:
    """Top samples by sorting pairs of feature and sample, then the first n of each feature."""
    flat, h = indices.flatten(), values.flatten()
    of_slot = torch.from_numpy(samples.astype(np.int64)).repeat_interleave(indices.shape[1])
    n_samples = int(of_slot.max()) + 1

    def run() -> torch.Tensor:
        pairs, where = torch.unique(flat * n_samples + of_slot, return_inverse=True)
        best = torch.zeros(len(pairs)).scatter_reduce_(0, where, h, "amax")
        order = torch.argsort(best, descending=True, stable=True)
        order = order[torch.argsort(pairs[order] // n_samples, stable=True)]
        feature = pairs[order] // n_samples
        first = torch.searchsorted(feature, feature)
        return order[torch.arange(len(order)) - first < n]

    return run


def rows() -> list[dict[str, Any]]:
    """The table of ratios."""
    timing.refuse_debug()
    mt.set_num_threads(timing.THREADS)
    torch.set_num_threads(timing.THREADS)
    table = []
    for n, k, d_sae, skewed in [
        (1 << 16, 32, 16_384, False),
        (1 << 16, 32, 16_384, True),
        (1 << 16, 50, 131_072, True),
    ]:
        n = max(int(n * timing.SCALE), 1024)
        codes = codes_of(n, k, d_sae, skewed)
        indices, values = codes.to_torch()
        shape = f"n {n}, k {k}, d_sae {d_sae}, {'zipf' if skewed else 'uniform'}"
        ours = lambda codes=codes: mt.feature_stats(codes)  # noqa: E731
        peer = torch_statistics(indices, values, d_sae)
        table.append(
            timing.compare("feature statistics", shape, "torch bincount, scatter_add", ours, peer, bar=5)
        )
        samples = np.arange(n) // 64
        labels = {"sample": samples, "position": np.arange(n) % 64}
        top = lambda codes=codes, labels=labels: mt.top_samples(codes, labels, n=20)  # noqa: E731
        table.append(
            timing.compare(
                "top 20 samples", shape, "torch unique, sort", top, torch_top(indices, values, samples, 20)
            )
        )
    n = max(int(8192 * timing.SCALE), 512)
    codes = codes_of(n, 32, 16_384, True)
    shape = f"n {n}, k 32, d_sae 16384, zipf"
    ours = lambda: mt.feature_stats(codes)  # noqa: E731
    table.append(
        timing.compare(
            "firing counts",
            shape,
            "torch nonzero on dense codes",
            ours,
            nonzero_counts(*codes.to_torch(), 16_384),
            bar=10,
        )
    )
    for d in (512, 2048):
        rng = np.random.default_rng(timing.SEED)
        x, decoder = (rng.standard_normal((m, d), dtype=np.float32) for m in (n, 16_384))
        ours = lambda x=x, decoder=decoder: mt.fvu(x, codes, W_dec=decoder)  # noqa: E731
        peer = torch_fvu(torch.from_numpy(x), *codes.to_torch(), torch.from_numpy(decoder))
        table.append(timing.compare("FVU of codes", f"{shape}, d {d}", "torch embedding_bag", ours, peer))
    return table


if __name__ == "__main__":
    timing.show(rows())

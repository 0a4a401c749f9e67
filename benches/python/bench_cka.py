"""Linear CKA maps against a careful torch loop and the CKA packages.

    python benches/python/bench_cka.py

Both sides alternate in one process with the same number of threads; a ratio above 1 means that microtome is faster.
Peers compute the debiased estimator too. The torch loop is written as somebody would who knows the costs: rows centred,
every Gram matrix (or product of columns, whichever is cheaper) once, and no n x n product of Gram matrices.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import timing
import torch

import microtome as mt


def layers(count: int, n: int, d: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """Layers that share a signal, as the residual streams of one model do."""
    generator = torch.Generator().manual_seed(timing.SEED)
    shared = torch.randn(n, 8, generator=generator)
    noise = (torch.randn(n, d, generator=generator) for _ in range(count))
    return [(z + shared @ torch.randn(8, d, generator=generator) / 2).to(dtype) for z in noise]


def ratios_of(hsic: torch.Tensor) -> torch.Tensor:
    scale = hsic.diagonal().sqrt()
    return hsic / scale / scale[:, None]


def hsic1(n: int, inner: Any, rows: Any, totals: Any) -> Any:
    return (inner + totals / ((n - 1) * (n - 2)) - 2 / (n - 2) * rows) / (n * (n - 3))


@torch.no_grad()
def torch_gram(xs: list[torch.Tensor]) -> torch.Tensor:
    """Gram form: L Gram matrices, then inner products."""
    n, grams = len(xs[0]), []
    for x in xs:
        x = x.float() - x.float().mean(0)
        grams.append((x @ x.T).fill_diagonal_(0))
    rows = torch.stack([g.sum(1) for g in grams]).double()  # (L, n)
    inner = torch.zeros(len(xs), len(xs), dtype=torch.float64)
    for i, k in enumerate(grams):
        for j, other in enumerate(grams[i:], i):
            inner[i, j] = inner[j, i] = torch.dot(k.view(-1), other.view(-1))
    totals = rows.sum(1)
    return ratios_of(hsic1(n, inner, rows @ rows.T, totals[:, None] * totals))


@torch.no_grad()
def torch_feature(xs: list[torch.Tensor]) -> torch.Tensor:
    """Feature form: products of columns, pair by pair, and the norms of the rows."""
    n = len(xs[0])
    xs = [x.float() - x.float().mean(0) for x in xs]
    norms = torch.stack([x.square().sum(1) for x in xs]).double()  # (L, n)
    inner = torch.zeros(len(xs), len(xs), dtype=torch.float64)
    for i, x in enumerate(xs):
        for j, y in enumerate(xs[i:], i):
            inner[i, j] = inner[j, i] = (x.T @ y).square().sum()
    diagonal, totals = norms @ norms.T, -norms.sum(1)
    return ratios_of(hsic1(n, inner - diagonal, diagonal, totals[:, None] * totals))


class Replay(torch.nn.Module):
    """A model whose layers say what they are told: torch_cka only looks at modules."""

    def __init__(self, xs: list[torch.Tensor]) -> None:
        super().__init__()
        self.xs = xs
        self.layers = torch.nn.ModuleList(torch.nn.Identity() for _ in xs)

    def forward(self, _: torch.Tensor) -> None:
        for layer, x in zip(self.layers, self.xs, strict=True):
            layer(x)


def torch_cka_map(xs: list[torch.Tensor]) -> Callable[[], Any]:
    import torch_cka

    names = [f"layers.{i}" for i in range(len(xs))]
    loader = torch.utils.data.DataLoader(torch.zeros(1, 1), collate_fn=lambda items: [items[0]])

    def run() -> torch.Tensor:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            cka = torch_cka.CKA(Replay(xs), Replay(xs), "a", "b", names, names)
            cka.compare(loader)
            return cka.export()["CKA"]

    return run


def ckatorch_map(xs: list[torch.Tensor]) -> Callable[[], Any]:
    import ckatorch

    def run() -> list[list[float]]:
        one = [
            [float(ckatorch.cka_base(x, y, kernel="linear", unbiased=True)) for y in xs[: i + 1]]
            for i, x in enumerate(xs)
        ]
        return [[one[max(i, j)][min(i, j)] for j in range(len(xs))] for i in range(len(xs))]

    return run


def pytorch_cka_map(xs: list[torch.Tensor]) -> Callable[[], Any]:
    import cka

    def run() -> Any:
        return cka.cka_from_features(xs, xs)

    return run


def rows() -> list[dict[str, Any]]:
    """The table of this file."""
    timing.refuse_debug()
    mt.set_num_threads(timing.THREADS)
    torch.set_num_threads(timing.THREADS)
    table = []
    for n, d, dtype, peer in [
        (2048, 1024, torch.float32, torch_gram),
        (2048, 1024, torch.bfloat16, torch_gram),
        (16384, 256, torch.float32, torch_feature),
        (8192, 768, torch.float32, torch_feature),
    ]:
        xs = layers(12, n, d, dtype)
        shape = f"12 x 12, n {n}, d {d}, {str(dtype).removeprefix('torch.')}"
        table.append(
            timing.compare(
                "cka_matrix",
                shape,
                peer.__name__,
                partial(mt.cka_matrix, xs),
                partial(peer, xs),
                bar=3,
                atol=2e-3,
            )
        )
    xs = layers(12, 512, 512)
    for peer_name, factory, bar in [
        ("torch_cka", torch_cka_map, 50),
        ("ckatorch", ckatorch_map, 10),
        ("pytorch-cka", pytorch_cka_map, None),
    ]:
        try:
            theirs = factory(xs)
        except ImportError:
            continue
        ours = partial(mt.cka_matrix, xs)
        shape = "12 x 12, n 512, d 512"
        table.append(timing.compare("cka_matrix", shape, peer_name, ours, theirs, bar=bar, atol=2e-3))
    return table


if __name__ == "__main__":
    timing.show(rows())

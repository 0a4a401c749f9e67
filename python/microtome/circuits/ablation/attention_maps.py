"""Attention of chosen heads over a picture."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from microtome.circuits.ablation.interventions import Heads
from microtome.circuits.forward.restore import attention_implementation, left_as_found
from microtome.circuits.pairs.pair_set import PreparedPair
from microtome.errors import ShapeError

__all__ = ["AttentionMap", "attention_maps"]

Matrix = npt.NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class AttentionMap:
    """Attention of one head from one position."""

    layer: int
    head: int
    query: int
    """The position that attends."""
    weights: Matrix
    """Weights on all positions, ``(P,)``; they add up to 1."""
    image: npt.NDArray[np.int64]
    """Positions of the image tokens, in order."""

    @property
    def image_mass(self) -> float:
        """Share of the attention that falls on the picture."""
        return float(self.weights[self.image].sum())

    @property
    def entropy(self) -> float:
        """Entropy in nats of the attention within the picture."""
        p = self.weights[self.image].astype(np.float64)
        p = p / p.sum() if p.sum() else p
        return float(-(p[p > 0] * np.log(p[p > 0])).sum())

    def grid(self, rows: int | None = None) -> Matrix:
        """The attention within the picture as ``(rows, columns)``, in reading order; a square when ``rows`` is None.

        Raises:
            ShapeError: the image tokens do not fill such a grid.
        """
        n = len(self.image)
        height = rows if rows is not None else round(n**0.5)
        if not n or height < 1 or n % height or (rows is None and height * height != n):
            raise ShapeError(
                f"grid: expected {n} image tokens to fill the rows, found rows={rows}. Give rows"
            )
        return self.weights[self.image].reshape(height, -1)

    def mass_in(self, box: tuple[float, float, float, float], rows: int | None = None) -> float:
        """Share of the attention within the picture that falls on cells whose centre lies in ``box``.

        Args:
            box: left, top, right, bottom as fractions of the picture.
            rows: rows of the grid.
        """
        grid = self.grid(rows)
        height, width = grid.shape
        x, y = (np.arange(width) + 0.5) / width, (np.arange(height) + 0.5) / height
        inside = ((y >= box[1]) & (y < box[3]))[:, None] & ((x >= box[0]) & (x < box[2]))
        return float(grid[inside].sum() / grid.sum())


def attention_maps(model: Any, pair: PreparedPair, heads: Heads, query: int = -1) -> list[AttentionMap]:
    """Attention of ``heads`` from position ``query`` of the clean prompt, with eager attention for the time of one forward.

    Raises:
        ShapeError: a head or a position that does not exist.
    """
    from microtome.capture.models import adapt

    adapter = adapt(model)
    for layer, head in heads:
        if not (0 <= layer < adapter.n_layers and 0 <= head < adapter.n_heads):
            raise ShapeError(f"heads: expected heads of the model, found {(layer, head)}")
    if not -pair.length <= query < pair.length:
        raise ShapeError(f"query: expected a position of {pair.length}, found {query}")
    query %= pair.length
    patterns: dict[int, torch.Tensor] = {}
    inputs = {name: x.to(model.device) for name, x in pair.clean.items()}
    with (
        left_as_found(model),
        torch.no_grad(),
        attention_implementation(model, "eager"),
        ExitStack() as stack,
    ):
        points = adapt(model).hook_points()
        for layer in {layer for layer, _ in heads}:
            see = _keep(patterns, layer, query)
            stack.callback(points[f"blocks.{layer}.attn.hook_pattern"].observe(see).remove)
        model(**inputs, use_cache=False)
    image = np.flatnonzero(np.array(pair.kinds) != "text")
    return [
        AttentionMap(layer, head, query, patterns[layer][head].cpu().numpy(), image) for layer, head in heads
    ]


def _keep(patterns: dict[int, torch.Tensor], layer: int, query: int) -> Any:
    def see(pattern: torch.Tensor) -> None:
        patterns[layer] = pattern[0, :, query].float().clone()  # (H, P)

    return see

"""Drawing scenes: 32 x 32 RGB, one 8 x 8 cell a thing, with jitter in size, place, colour and noise."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING

import numpy as np

from microtome.organism.scenes import COLOURS, DIGITS, GRID, OPERATORS, SHAPES, Scene

if TYPE_CHECKING:
    from numpy.typing import NDArray

CELL = 8  # pixels; also the patch size of the vision tower, so a cell is an image token
SIDE = GRID * CELL

_RGB = dict(
    zip(
        COLOURS,
        ((222, 46, 46), (44, 176, 66), (52, 84, 232), (236, 214, 44), (166, 66, 206), (44, 208, 218)),
        strict=True,
    )
)
_SIZES = (6, 7, 8)
_MARGIN = 1  # a shape may reach this far over the edge of its cell

_FONT = dict(
    zip(
        DIGITS + OPERATORS,
        (  # 4 x 7 bitmaps, a hexadecimal figure a row
            "6999996",
            "2622227",
            "691248f",
            "6912196",
            "26aaf22",
            "f88e196",
            "688e996",
            "f112244",
            "6996996",
            "6997116",
            "0027200",
            "000f000",
        ),
        strict=True,
    )
)


def _disc(y: NDArray[np.float64], x: NDArray[np.float64]) -> NDArray[np.bool_]:
    return x * x + y * y <= 1


def _square(y: NDArray[np.float64], x: NDArray[np.float64]) -> NDArray[np.bool_]:
    return np.maximum(abs(x), abs(y)) <= 0.86


def _triangle(y: NDArray[np.float64], x: NDArray[np.float64]) -> NDArray[np.bool_]:
    return (y <= 0.9) & (2 * abs(x) <= y + 1)


def _cross(y: NDArray[np.float64], x: NDArray[np.float64]) -> NDArray[np.bool_]:
    return np.minimum(abs(x), abs(y)) <= 0.34


_OUTLINES = dict(zip(SHAPES, (_disc, _square, _triangle, _cross), strict=True))


@cache
def _stencil(glyph: str, size: int) -> NDArray[np.float32]:
    """Coverage in 0..1 of each pixel, (size, size) for a shape, (7, 4) for a character."""
    if glyph in _FONT:
        rows = [[int(figure, 16) >> bit & 1 for bit in (3, 2, 1, 0)] for figure in _FONT[glyph]]
        return np.array(rows, np.float32)
    fine = 8  # sub-pixels a side: antialiasing
    axis = (np.arange(size * fine) + 0.5) / (size * fine) * 2 - 1
    inside = _OUTLINES[glyph](axis[:, None], axis[None, :])
    coverage: NDArray[np.float32] = inside.reshape(size, fine, size, fine).mean((1, 3), dtype=np.float32)
    return coverage


def render(scenes: Sequence[Scene], rng: np.random.Generator) -> NDArray[np.uint8]:
    """Draw scenes.

    Args:
        scenes: The scenes.
        rng: Source of the jitter; the same state and scenes of the same size give the same jitter.

    Returns:
        Images, (n, 32, 32, 3), RGB.
    """
    n, edge = len(scenes), _MARGIN
    canvas = np.empty((n, SIDE + 2 * edge, SIDE + 2 * edge, 3), np.float32)
    canvas[:] = rng.uniform(15, 60, (n, 1, 1, 3))
    most = max(len(scene.things) for scene in scenes)
    tints = rng.uniform(-20, 20, (n, most, 3)).astype(np.float32)
    shifts = rng.random((n, most, 3))  # size, y, x
    for i, scene in enumerate(scenes):
        for j, thing in enumerate(scene.things):
            size_at, y_at, x_at = shifts[i, j]
            mask = _stencil(thing.glyph, _SIZES[int(size_at * len(_SIZES))])
            height, width = mask.shape
            reach = 0 if thing.glyph in _FONT else _MARGIN
            top = edge + thing.row * CELL - reach + int(y_at * (CELL - height + 2 * reach + 1))
            left = edge + thing.column * CELL - reach + int(x_at * (CELL - width + 2 * reach + 1))
            region = canvas[i, top : top + height, left : left + width]
            region += mask[..., None] * (np.asarray(_RGB[thing.colour], np.float32) + tints[i, j] - region)
    canvas = canvas[:, edge:-edge, edge:-edge]
    canvas += rng.standard_normal(canvas.shape, dtype=np.float32) * 4
    return np.clip(canvas, 0, 255).astype(np.uint8)

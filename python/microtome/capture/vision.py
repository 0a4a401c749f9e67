"""Rows of the vision tower and the projector: which sample each belongs to.

A tower knows images, not samples, and often packs all patches of a batch into one sequence. Its rows belong
to the sample whose placeholder tokens their features replace; features follow each other in batch order,
images before videos.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from microtome.capture.plan import KINDS, Plan
from microtome.capture.points import HookPoint
from microtome.capture.rows import Flags, Ints
from microtome.capture.writer import Matrix
from microtome.errors import ShapeError

__all__ = ["VisionCalls", "shares"]


class VisionCalls:
    """What the vision hooks saw in a run, all rows, as the tower orders them."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._calls: dict[str, list[tuple[torch.Tensor, torch.Size]]] = {}

    def see(self, point: HookPoint, value: torch.Tensor) -> None:
        """Copy a value of any leading shape."""
        flat = value.reshape(-1, value.shape[-1])
        copy = torch.empty(flat.shape, dtype=self._plan.dtype, pin_memory=flat.is_cuda)
        copy.copy_(flat, non_blocking=True)
        self._calls.setdefault(point.name, []).append((copy, value.shape))

    def complete(self, placeholders: Mapping[int, Flags]) -> bool:
        """Whether every point has seen images and videos, as far as the batch has them."""
        expected = max(1, sum(bool(mask.any()) for mask in placeholders.values()))
        return all(len(self._calls.get(point.name, [])) >= expected for point in self._plan.points)

    def widths(self) -> dict[str, int]:
        """Width of every value seen."""
        return {name: calls[0][0].shape[-1] for name, calls in self._calls.items()}

    def rows(
        self, points: Sequence[HookPoint], placeholders: Mapping[int, Flags], pixels: Any, wanted: Flags
    ) -> tuple[dict[str, Any], Ints, dict[str, Matrix]]:
        """Row columns, rows per sample and values of the points of one space."""
        sample, kind = self._owners(points[0], placeholders, pixels)
        for point in points[1:]:
            other = self._owners(point, placeholders, pixels)[0]
            if not np.array_equal(other, sample):
                raise ShapeError(
                    f"hook {point.name}: expected the {len(sample)} rows of {points[0].name}, found "
                    f"{len(other)}. "
                    f"Capture them into stores of their own"
                )
        order = np.argsort(sample, kind="stable")
        order = order[wanted[sample[order]]]
        counts = np.bincount(sample[order], minlength=len(wanted))
        position = np.arange(len(order)) - np.repeat(np.cumsum(counts) - counts, counts)
        matrices = {
            point.name: Matrix(
                [copy for copy, _ in self._calls.get(point.name, [])] or [self._plan.empty(point)], order
            )
            for point in points
        }
        return {"position": position, "kind": kind[order]}, counts, matrices

    def _owners(self, point: HookPoint, placeholders: Mapping[int, Flags], pixels: Any) -> tuple[Ints, Ints]:
        """Sample and kind of each row that a point saw."""
        calls = self._calls.get(point.name, [])
        kinds = [kind for kind, mask in placeholders.items() if mask.any()]
        if not calls or not kinds:
            if calls:
                raise ShapeError(
                    f"hook {point.name}: expected no rows without placeholders, found {len(calls[0][0])}"
                )
            return np.zeros(0, np.int64), np.zeros(0, np.int64)
        if len(kinds) > 1 and len(calls) != len(kinds):
            raise ShapeError(
                f"hook {point.name}: expected a call for images and one for videos, found {len(calls)}"
            )
        shapes = [shape for _, shape in calls]
        if len(kinds) == 1 and len(calls) > 1:  # one call per image
            shapes = [torch.Size([sum(len(copy) for copy, _ in calls), shapes[0][-1]])]
        counts = [
            shares(shape, placeholders[kind], pixels if kind == KINDS["image"] else None, point.name)
            for kind, shape in zip(kinds, shapes, strict=True)
        ]
        samples = [np.repeat(np.arange(len(n)), n) for n in counts]
        return np.concatenate(samples), np.repeat(np.array(kinds), [int(n.sum()) for n in counts])


def shares(shape: torch.Size, placeholders: Flags, pixels: Any, name: str) -> Ints:
    """How many rows of a tower's output belong to each sample of the batch.

    In turn: the only sample with placeholders owns all rows; a padded stack of tiles is counted tile by tile;
    an output with one entry per run of placeholders goes by runs; otherwise rows are shared in proportion to
    placeholders, where that comes out even.

    Args:
        shape: (rows, d) packed, or (images, rows, d).
        placeholders: (samples, columns), where the image's or video's tokens are.
        pixels: the model's ``pixel_values``, where it has them.
        name: the hook, for the message.

    Raises:
        ShapeError: the shares cannot be told.
    """
    tokens: Ints = placeholders.sum(1)
    total, by_image = shape[:-1].numel(), len(shape) == 3
    if (tokens > 0).sum() == 1:
        return np.where(tokens > 0, total, 0)
    runs: Ints = (np.diff(placeholders.astype(np.int8), axis=1, prepend=0) == 1).sum(1)
    counts: Ints = runs * (shape[1] if by_image else 0)
    if by_image and isinstance(pixels, torch.Tensor) and pixels.ndim == 5 and len(pixels) == runs.sum():
        tiles = pixels.flatten(2).ne(0).any(-1).sum(1).cpu().numpy()  # tiles of zeros pad the stack
        if tiles.sum() == shape[0]:
            np.add.at(counts := np.zeros_like(runs), np.repeat(np.arange(len(runs)), runs), tiles * shape[1])
            return counts
    if by_image and shape[0] == runs.sum():
        return counts
    counts, left = np.divmod(total * tokens, tokens.sum())
    unit = shape[1] if by_image and shape[0] > 1 else 1  # an image belongs to one sample
    if left.any() or (counts % unit).any():
        raise ShapeError(
            f"hook {name}: expected rows that divide by the placeholders {tokens.tolist()} of the samples, "
            f"found shape "
            f"{tuple(shape)}. Capture this hook with one sample per forward"
        )
    return counts

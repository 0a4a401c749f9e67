"""The vision tower's own stage: from each patch, read what is drawn in it and where the patch is."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import nn
from torch.nn import functional
from transformers import CLIPVisionModel

from microtome.organism.architecture import vision_config
from microtome.organism.packing import pixel_values
from microtome.organism.render import render
from microtome.organism.scenes import (
    CELLS,
    COLOURS,
    GLYPHS,
    GRID,
    MAX_THINGS,
    MIN_THINGS,
    Scene,
    draw_digits,
    draw_shapes,
)

_HEADS = (
    len(GLYPHS) + 1,
    len(COLOURS) + 1,
    GRID,
    GRID,
)  # glyph and colour with an own class for empty, row, column


def patch_labels(scenes: Sequence[Scene]) -> torch.Tensor:
    """Glyph, colour, row and column of each patch, (n, 16, 4)."""
    labels = np.zeros((len(scenes), CELLS, len(_HEADS)), np.int64)
    labels[..., 0], labels[..., 1] = len(GLYPHS), len(COLOURS)
    labels[..., 2], labels[..., 3] = np.divmod(np.arange(CELLS), GRID)
    for i, scene in enumerate(scenes):
        for thing in scene.things:
            labels[i, thing.cell, :2] = GLYPHS.index(thing.glyph), COLOURS.index(thing.colour)
    return torch.from_numpy(labels)


def train_vision(seed: int, steps: int, rows: int, rate: float) -> tuple[CLIPVisionModel, dict[str, float]]:
    """A vision tower whose last layer but one tells what is where, and its accuracy in the last step.

    That layer without the class token is what LLaVA reads.
    """
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    tower = CLIPVisionModel(vision_config())
    head = nn.Linear(tower.config.hidden_size, sum(_HEADS))
    parameters = [*tower.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.02, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.05)
    accuracy: dict[str, float] = {}
    for _ in range(steps):
        scenes = [
            draw_digits(rng, "train") if rng.random() < 0.4 else draw_shapes(rng, int(count), "train")
            for count in rng.integers(MIN_THINGS, MAX_THINGS + 1, size=rows)
        ]
        labels = patch_labels(scenes)
        with torch.autocast("cpu", torch.bfloat16):
            seen = tower(pixel_values(render(scenes, rng)), output_hidden_states=True).hidden_states[-2][
                :, 1:
            ]
            parts = head(seen).float().flatten(0, 1).split(_HEADS, -1)
        # Most patches are empty: what is drawn counts most.
        drawn = labels[..., 0].flatten() < len(GLYPHS)
        weights = torch.where(drawn, 1.0, 0.15)
        loss = sum(
            (functional.cross_entropy(part, labels[..., i].flatten(), reduction="none") * weights).sum()
            / weights.sum()
            for i, part in enumerate(parts)
        )
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        right = [
            (part.argmax(-1) == labels[..., i].flatten())[drawn].float().mean().item()
            for i, part in enumerate(parts)
        ]
        accuracy = dict(zip(("glyph", "colour", "row", "column"), right, strict=True))
    return tower, accuracy

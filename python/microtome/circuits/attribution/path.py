"""The way from the counterfactual's merged embeddings to the clean ones, along which gradients are taken."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from microtome.circuits.forward.decoder import Merged
from microtome.circuits.forward.nodes import partnered

__all__ = ["interpolated"]


def interpolated(
    adapter: Any,
    clean: Merged,
    corrupted: Merged,
    partner: Tensor,
    points: tuple[float, ...],
    path: str,
    ids: Tensor,
) -> Merged:
    """The clean prompt's run at embeddings e' + α (e - e'), a copy of the batch for each α, DeepStack features likewise."""
    embeds, deepstack = _counterfactual_embeddings(clean, corrupted, partner)
    if path == "text_only":
        image = (adapter.row_kinds(ids) != 0)[..., None]
        embeds, deepstack = torch.where(image, clean.embeds, embeds), clean.deepstack

    def between(a: Tensor, b: Tensor) -> Tensor:
        steps = [a.float() + alpha * (b.float() - a.float()) if alpha < 1 else b for alpha in points]
        return torch.cat([step.to(b.dtype) for step in steps])

    added = tuple(between(a, b) for a, b in zip(deepstack, clean.deepstack, strict=True))
    return clean.repeat(len(points)).at(between(embeds, clean.embeds), added)


def _counterfactual_embeddings(
    clean: Merged, corrupted: Merged, partner: Tensor
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Embeddings and DeepStack features of the counterfactual at the clean prompt's positions."""
    embeds = partnered(corrupted.embeds, partner)
    ours, theirs = clean.visual(), corrupted.visual()
    if not clean.deepstack or ours is None or theirs is None:
        return embeds, ()
    added = []
    for features in corrupted.deepstack:
        everywhere = corrupted.embeds.new_zeros(corrupted.embeds.shape)
        everywhere[theirs] = features.to(everywhere.dtype)
        added.append(partnered(everywhere, partner)[ours])
    return embeds, tuple(added)

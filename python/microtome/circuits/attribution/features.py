"""Which heads drive a feature: attribution patching with a decoder direction as the target (spatial-features, B13).

Target y = Σ_{t ∈ T} h_{L,t} · v, v the decoder vector of a feature at layer L, h the layer's output. In the
corrupted run the visual tokens of the merged embeddings (and DeepStack features) are a mean embedding over
many prompts.

    A:  (corrupted - clean) · ∇_clean        negative: removing visual detail lowers the feature
    B:  (clean - corrupted) · ∇_corrupted    positive: keeping visual detail raises the feature

at queries and keys after RoPE, or at z, summed over positions and dimensions of a head, mean over prompts.
With grouped-query attention keys are attributed per query head, as if repeated, so every head has a score.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import polars as pl
import torch
from torch import Tensor

from microtome.arguments import require_one_of
from microtome.circuits.forward.attention import Watch, watched_attention
from microtome.circuits.forward.decoder import Merged, decode, merge
from microtome.circuits.forward.directions import finite_direction
from microtome.circuits.forward.nodes import on_residuals
from microtome.circuits.forward.restore import left_as_found
from microtome.circuits.pairs.pair_set import PairBatch, PairSet, as_pair_set
from microtome.errors import ShapeError
from microtome.progress import bar

__all__ = ["FeatureScores", "MeanEmbedding", "feature_attribution", "mean_embedding"]

Targets = Literal["text", "argmax", "last"]
Site = Literal["q", "k", "z"]


@dataclass(frozen=True, eq=False)
class MeanEmbedding:
    """What stands for an image that shows nothing in particular."""

    embedding: Tensor  # (d,) or (visual tokens, d)
    deepstack: tuple[Tensor, ...]  # as many, of the same shape


@dataclass(frozen=True, eq=False)
class FeatureScores:
    """Scores of all heads for one feature."""

    layer: int
    scores: Mapping[str, npt.NDArray[np.float64]]
    """Site (q, k, z) -> ``(L, H)``; 0 above the feature's layer."""
    method: str
    n: int
    """Prompts in the mean."""

    @property
    def heads(self) -> npt.NDArray[np.float64]:
        """Queries and keys together, or z: the sum over the sites. Shape ``(L, H)``."""
        return np.asarray(np.sum(list(self.scores.values()), 0))

    def to_polars(self) -> pl.DataFrame:
        """One row per head: layer, head, a column for each site, score; the largest magnitude first."""
        layers, heads = np.indices(self.heads.shape)
        columns = {"layer": layers.ravel(), "head": heads.ravel()}
        sites = {site: values.ravel() for site, values in self.scores.items()}
        table = pl.DataFrame({**columns, **sites, "score": self.heads.ravel()})
        return table.sort(pl.col("score").abs(), descending=True, maintain_order=True)


def mean_embedding(
    model: Any, pairs: PairSet, *, positional: bool = False, batch_size: int = 16
) -> MeanEmbedding:
    """Mean of the visual tokens' merged embeddings and DeepStack features over the clean prompts.

    Args:
        model: a transformers model; left as it was found.
        pairs: prompts with pictures.
        positional: a mean for each visual token instead of one for all; needs pictures of one size.
        batch_size: prompts per forward.

    Raises:
        ShapeError: no prompt shows a picture, or pictures of several sizes with ``positional``.
    """
    from microtome.capture.models import adapt

    adapter = adapt(model)
    sums: list[Tensor] = []
    n = 0
    with left_as_found(model), torch.no_grad():
        for batch in as_pair_set(pairs).batches(batch_size, model.device):
            merged = merge(adapter, batch.clean)
            visual = adapter.row_kinds(batch.clean["input_ids"]) != 0
            per_row = int(visual[0].sum())
            if not per_row:
                raise ShapeError("mean_embedding: expected prompts with pictures, found one without")
            parts = [merged.embeds[visual], *merged.deepstack]
            rows = [x.double().unflatten(0, (-1, per_row)).sum(0) for x in parts]  # (visual tokens, d)
            if not positional:
                rows = [x.sum(0) for x in rows]
            if sums and sums[0].shape != rows[0].shape:
                raise ShapeError("mean_embedding: positional: expected pictures of one size, found several")
            sums = [a + b for a, b in zip(sums, rows, strict=True)] if sums else rows
            n += len(batch) * (1 if positional else per_row)
    means = [(x / n).float() for x in sums]
    return MeanEmbedding(means[0], tuple(means[1:]))


def feature_attribution(
    model: Any,
    pairs: PairSet,
    layer: int,
    direction: Any,
    mean: MeanEmbedding,
    method: Literal["A", "B"] = "A",
    *,
    sites: tuple[Site, ...] = ("q", "k"),
    targets: Targets = "text",
    batch_size: int = 4,
    progress: bool = True,
) -> FeatureScores:
    """Score every head for one feature.

    Args:
        model: a transformers model; left as it was found.
        pairs: the prompts that activate the feature most; clean sides are used.
        layer: the feature's layer L.
        direction: its decoder vector v, ``(d,)``.
        mean: what the corrupted run shows, see :func:`mean_embedding`.
        method: ``"A"`` or ``"B"``.
        sites: ``("q", "k")`` as in the paper, ``("z",)`` for the heads' outputs, or all three.
        targets: positions T of the sum: all text positions, the one after the image that projects most on v
            in the clean run, or the last.
        batch_size: prompts per forward.
        progress: show a bar.

    Raises:
        ShapeError: the layer or the width is not the model's, or an option is not one of those there are.
        NonFiniteError: a direction with NaN or infinity.
    """
    from microtome.capture.models import adapt

    pairs = as_pair_set(pairs)
    adapter = adapt(model)
    v = finite_direction("direction", direction).to(model.device, torch.float32)
    if not 0 <= layer < adapter.n_layers or v.shape != (adapter.d_model,):
        raise ShapeError(
            f"feature: expected a layer below {adapter.n_layers} and a direction ({adapter.d_model},), found layer {layer} "
            f"and {tuple(v.shape)}"
        )
    require_one_of("method", method, ("A", "B"))
    require_one_of("targets", targets, ("text", "argmax", "last"))
    if not sites or set(sites) - {"q", "k", "z"}:
        raise ShapeError(f"sites: expected some of q, k, z, found {sites}")
    totals: dict[str, npt.NDArray[np.float64]] = {
        site: np.zeros((adapter.n_layers, adapter.n_heads)) for site in sites
    }
    with (
        left_as_found(model),
        torch.inference_mode(False),
        watched_attention(model) as watch,
        bar("feature attribution", len(pairs), progress, "prompts") as done,
    ):
        for batch in pairs.batches(batch_size, model.device, done):
            run = _Run(adapter, batch, layer, v, sites, watch)
            clean = merge(adapter, batch.clean)
            for site, values in run.scores(
                clean, _corrupted(adapter, batch, clean, mean), method, targets
            ).items():
                totals[site] += values
    return FeatureScores(layer, {site: x / len(pairs) for site, x in totals.items()}, method, len(pairs))


def _corrupted(adapter: Any, batch: PairBatch, clean: Merged, mean: MeanEmbedding) -> Merged:
    """The clean run with the mean embedding in the place of every visual token, DeepStack features likewise."""
    visual = adapter.row_kinds(batch.clean["input_ids"]) != 0
    embeds = clean.embeds.clone()
    n = len(batch)

    def spread(x: Tensor, like: Tensor) -> Tensor:
        rows = x.repeat(n, 1) if x.ndim == 2 else x.expand(len(like), -1)
        return rows.to(like.device, like.dtype)

    embeds[visual] = spread(mean.embedding, embeds[visual])
    return clean.at(embeds, [spread(m, x) for m, x in zip(mean.deepstack, clean.deepstack, strict=True)])


@dataclass(eq=False)
class _Run:
    """One batch of prompts."""

    adapter: Any
    batch: PairBatch
    layer: int
    direction: Tensor
    sites: tuple[Site, ...]
    watch: Watch

    def scores(
        self, clean: Merged, corrupted: Merged, method: str, targets: Targets
    ) -> dict[str, npt.NDArray[np.float64]]:
        """Sums over the batch, site -> (L, H)."""
        at, other = (clean, corrupted) if method == "A" else (corrupted, clean)
        with torch.no_grad():
            values, other_resid = self._forward(other)
        leaf = at.embeds.detach().requires_grad_()
        with torch.enable_grad():
            own, resid = self._forward(at.at(leaf, at.deepstack))
            where = self._where((resid if method == "A" else other_resid).detach(), targets)
            target = (resid.float() @ self.direction * where).sum()
        below = {key: x for key, x in own.items() if key[1] <= self.layer}
        grads = torch.autograd.grad(target, list(below.values()), allow_unused=True)
        out: dict[str, npt.NDArray[np.float64]] = {
            site: np.zeros((self.adapter.n_layers, self.adapter.n_heads)) for site in self.sites
        }
        for ((site, layer), x), grad in zip(below.items(), grads, strict=True):
            if grad is not None:
                product = (values[site, layer].float() - x.detach().float()) * grad.float()
                out[site][layer] += product.double().sum((0, 2, 3)).cpu().numpy()
        return out

    def _forward(self, merged: Merged) -> tuple[dict[tuple[str, int], Tensor], Tensor]:
        """Values of the sites, (b, H, p, d_head), and the feature's layer's output."""
        values: dict[tuple[str, int], Tensor] = {}
        resid: list[Tensor] = []

        def see(site: str, layer: int, x: Tensor) -> Tensor:
            if site in self.sites:
                values[site, layer] = x
            return x

        self.watch(see)
        try:
            with on_residuals(self.adapter, lambda _layer, x: resid.append(x), [self.layer]):
                decode(self.adapter, merged)
        finally:
            self.watch(None)
        return values, resid[0]

    def _where(self, clean_resid: Tensor, targets: Targets) -> Tensor:
        """Weights of the positions in the target, (b, p)."""
        text = self.adapter.row_kinds(self.batch.clean["input_ids"]) == 0
        if targets == "text":
            return text.float()
        where = torch.zeros(text.shape, device=text.device)
        if targets == "last":
            where[:, -1] = 1
            return where
        sees_image = text & ((~text).cumsum(-1) > 0)  # what comes before the image cannot depend on it
        projections = (clean_resid.float() @ self.direction).masked_fill(~sees_image, -torch.inf)
        return where.scatter(1, projections.argmax(-1, keepdim=True), 1.0)

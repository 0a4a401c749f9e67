"""How close image representations come to those of the same data in words, layer by layer (A13).

For each layer: the mean over a picture's data tokens of the largest cosine to any data token of the
description, from a separate run. Anisotropic models have high cosines between any two tokens, so the
mean-centred cosine stands beside it.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import polars as pl
import torch
from torch import Tensor

from microtome.circuits.forward.decoder import decode, merge
from microtome.circuits.forward.nodes import on_residuals
from microtome.circuits.forward.restore import left_as_found
from microtome.circuits.pairs.pair_set import PairSet, as_pair_set
from microtome.circuits.statistics import bootstrap
from microtome.errors import ShapeError

__all__ = ["alignment"]


def alignment(
    model: Any,
    visual: PairSet,
    textual: PairSet,
    *,
    top: float | None = None,
    group: str = "data",
    seed: int = 0,
) -> pl.DataFrame:
    """Alignment of the two forms of the same prompts.

    Args:
        model: a transformers model; left as it was found.
        visual: prompts with pictures; clean sides are used.
        textual: the same prompts in words, in the same order.
        top: mean of this share of the largest cosines instead of the largest one.
        group: the positions compared.
        seed: of the bootstrap over prompts.

    Returns:
        One row per layer, -1 for the merged embeddings: layer, cosine, cosine_low, cosine_high, centred,
        centred_low, centred_high, n_zero (tokens with a zero vector, left out).

    Raises:
        ShapeError: the two forms differ in number, ``top`` is no share, or a prompt has no such positions.

    Example:
        >>> from microtome import organism
        >>> from microtome.circuits import prepare
        >>> model, processor = organism.load_model(), organism.load_processor()
        >>> seen, told = (prepare(model, processor, organism.pairs("colour", form, 4)) for form in ("visual", "textual"))
        >>> alignment(model, seen, told)["layer"].to_list()
        [-1, 0, 1, 2, 3, 4, 5]
    """
    from microtome.capture.models import adapt

    as_pair_set(visual), as_pair_set(textual)
    if len(visual) != len(textual):
        raise ShapeError(f"textual: expected {len(visual)} prompts like visual, found {len(textual)}")
    if top is not None and not 0 < top <= 1:
        raise ShapeError(f"top: expected a share above 0 and up to 1, found {top}")
    adapter = adapt(model)
    with left_as_found(model), torch.no_grad():
        means = [_mean(_residuals(adapter, form, group)) for form in (visual, textual)]  # (L + 1, d) each
        found: list[list[tuple[float, int]]] = []
        for image, words in zip(
            _residuals(adapter, visual, group), _residuals(adapter, textual, group), strict=True
        ):
            plain = [_nearest(x, y, top) for x, y in zip(image, words, strict=True)]
            centred = [
                _nearest(x, y, top)
                for x, y in zip(image - means[0][:, None], words - means[1][:, None], strict=True)
            ]
            found.append(plain + centred)
    values = np.array([[cosine for cosine, _ in row] for row in found])  # (n, 2 (L + 1))
    zeros = np.array([[n for _, n in row] for row in found])
    rows = []
    for layer in range(adapter.n_layers + 1):
        row: dict[str, Any] = {"layer": layer - 1}
        for name, column in (("cosine", layer), ("centred", adapter.n_layers + 1 + layer)):
            known = values[:, column][~np.isnan(values[:, column])]
            row[name], row[f"{name}_low"], row[f"{name}_high"] = bootstrap(
                lambda x: float(x.mean()), [known], seed=seed
            )
        rows.append(row | {"n_zero": int(zeros[:, layer].sum())})
    return pl.DataFrame(rows)


def _residuals(adapter: Any, pairs: PairSet, group: str) -> Iterator[Tensor]:
    """Merged embeddings and resid_post of every layer at the group's positions, prompt by prompt: ``(L + 1, p, d)``."""
    for i, pair in enumerate(pairs):
        where = torch.from_numpy(np.asarray(pair.spans.get(group, ()), np.int64))
        if not len(where):
            raise ShapeError(f"pair {i}: expected {group} positions, found none")
        merged = merge(adapter, pair.clean)
        kept = [merged.embeds[0, where].float()]
        visit = partial(_keep, kept, where)
        with on_residuals(adapter, visit, with_deepstack=True):
            decode(adapter, merged)
        yield torch.stack(kept)


def _keep(kept: list[Tensor], where: Tensor, _layer: int, x: Tensor) -> None:
    kept.append(x[0, where].float())


def _mean(residuals: Iterator[Tensor]) -> Tensor:
    total, n = None, 0
    for x in residuals:
        total = x.double().sum(1) if total is None else total + x.double().sum(1)
        n += x.shape[1]
    if total is None:
        raise ShapeError("alignment: expected prompts, found none")
    return (total / n).float()


def _nearest(image: Tensor, words: Tensor, top: float | None) -> tuple[float, int]:
    """Mean over image tokens of the largest cosine to a word, and the number of zero vectors. ``(p, d), (q, d)``."""
    norms, others = image.norm(dim=-1), words.norm(dim=-1)
    zeros = int((norms == 0).sum() + (others == 0).sum())
    image, words = image[norms > 0] / norms[norms > 0, None], words[others > 0] / others[others > 0, None]
    if not len(image) or not len(words):
        return float("nan"), zeros
    cosines = image @ words.T
    k = 1 if top is None else max(1, round(top * len(words)))
    return float(cosines.topk(k, -1).values.mean()), zeros

"""Encode and decode in torch: dense, differentiable, any device. The recipe's formulas, once.

The functions take a dictionary's tensors by name (``W_enc (d_in, d_sae)``, ``W_dec (d_sae, d_out)``, ...), so
that stored tensors and a module's parameters go through the same lines.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeAlias

import torch
from torch import Tensor
from torch.nn import functional

from microtome.dictionary.recipe import Recipe

__all__ = [
    "Tensors",
    "activate",
    "decode_dense",
    "decode_ragged",
    "encode_dense",
    "encoder_input",
    "preactivations",
    "row_normalization",
    "scores",
    "topk_mask",
]

Tensors: TypeAlias = Mapping[str, Tensor]

_EPS = {"layer_norm": 1e-5, "constant_norm_rescale": 0.0}  # as in SAELens


def encoder_input(x: Tensor, tensors: Tensors, recipe: Recipe) -> Tensor:
    """``input_scale · normalize(x) − b_dec``: what meets ``W_enc``, shape ``(n, d_in)``."""
    u = x
    if recipe.normalize != "none":
        shift, spread = row_normalization(x, recipe)
        u = (x - shift) / (spread + _EPS[recipe.normalize])
    if recipe.input_scale != 1.0:
        u = u * recipe.input_scale
    return u - tensors["b_dec"] if recipe.apply_b_dec_to_input else u


def row_normalization(x: Tensor, recipe: Recipe) -> tuple[Tensor, Tensor]:
    """Shift and divisor of every row, each ``(n, 1)``: mean and deviation, or 0 and ``‖x‖ / sqrt(d_in)``."""
    if recipe.normalize == "layer_norm" and len(x):  # torch warns of a deviation of nothing
        mean = x.mean(-1, keepdim=True)
        return mean, (x - mean).std(-1, keepdim=True)
    return x.new_zeros(x.shape[0], 1), x.norm(dim=-1, keepdim=True) / x.shape[-1] ** 0.5


def preactivations(x: Tensor, tensors: Tensors, recipe: Recipe) -> Tensor:
    """``u W_enc + b``, shape ``(n, d_sae)``; the bias is ``b_gate`` for a gated dictionary."""
    bias = tensors["b_gate"] if recipe.activation == "gated" else tensors["b_enc"]
    return torch.addmm(bias, encoder_input(x, tensors, recipe), tensors["W_enc"])


def scores(pre: Tensor, tensors: Tensors, recipe: Recipe) -> Tensor:
    """What features are ranked by, or compared with their threshold."""
    return pre * tensors["W_dec"].norm(dim=1) if recipe.norm_aware else pre


def topk_mask(score: Tensor, k: int) -> Tensor:
    """The k largest positive scores of every row; ties go to the lower index. Shape of ``score``."""
    chosen = torch.topk(score, k, dim=1, sorted=True)
    mask = torch.zeros_like(score, dtype=torch.bool).scatter_(1, chosen.indices, True)
    last = chosen.values[:, -1:]
    tied = ((score >= last).sum(1) > k).nonzero().flatten()
    if len(tied):
        order = torch.sort(score[tied], dim=1, descending=True, stable=True).indices[:, :k]
        mask[tied] = torch.zeros_like(mask[tied]).scatter_(1, order, True)
    return mask & (score > 0)


def activate(pre: Tensor, tensors: Tensors, recipe: Recipe) -> Tensor:
    """Codes of pre-activations, dense ``(n, d_sae)``; gradients pass through the selected entries only."""
    codes = _selected(pre, tensors, recipe)
    if recipe.rescale_acts_by_decoder_norm:
        codes = codes * tensors["W_dec"].norm(dim=1)
    return codes


def _selected(pre: Tensor, tensors: Tensors, recipe: Recipe) -> Tensor:
    if recipe.activation == "gated":
        magnitude = (pre - tensors["b_gate"]) * tensors["r_mag"].exp() + tensors["b_mag"]
        return functional.relu(magnitude) * (pre > 0)
    codes = functional.relu(pre)
    score = scores(pre.detach(), {name: t.detach() for name, t in tensors.items()}, recipe)
    threshold = tensors.get("threshold")
    if threshold is not None:
        return codes * (score > threshold)
    if recipe.activation in ("topk", "batch_topk"):
        return codes * topk_mask(score, int(recipe.k or 1))
    return codes


def encode_dense(x: Tensor, tensors: Tensors, recipe: Recipe) -> Tensor:
    """Codes of rows, dense ``(n, d_sae)``."""
    return activate(preactivations(x, tensors, recipe), tensors, recipe)


def decode_dense(codes: Tensor, tensors: Tensors, recipe: Recipe, x: Tensor | None = None) -> Tensor:
    """Reconstruction ``(n, d_out)`` of dense codes; ``x`` where the recipe looks at the row again."""
    if recipe.rescale_acts_by_decoder_norm:
        codes = codes / _norms(tensors)
    return _to_output(codes @ tensors["W_dec"], tensors, recipe, x)


def decode_ragged(
    indptr: Tensor, indices: Tensor, values: Tensor, tensors: Tensors, recipe: Recipe, x: Tensor | None = None
) -> Tensor:
    """Reconstruction ``(n, d_out)`` of codes in compressed rows; only active rows of ``W_dec`` are read."""
    if recipe.rescale_acts_by_decoder_norm:
        values = values / _norms(tensors)[indices]
    summed = functional.embedding_bag(
        indices, tensors["W_dec"], indptr[:-1], mode="sum", per_sample_weights=values
    )
    return _to_output(summed, tensors, recipe, x)


def _norms(tensors: Tensors) -> Tensor:
    norms = tensors["W_dec"].norm(dim=1)
    return torch.where(norms > 0, norms, torch.ones_like(norms))


def _to_output(summed: Tensor, tensors: Tensors, recipe: Recipe, x: Tensor | None) -> Tensor:
    out = summed + tensors["b_dec"]
    if "W_skip" in tensors and x is not None:
        out = out + (x * recipe.input_scale) @ tensors["W_skip"].T
    if recipe.output_scale != 1.0:
        out = out * recipe.output_scale
    if recipe.normalize != "none" and x is not None:
        shift, spread = row_normalization(x, recipe)
        out = out * spread + shift
    return out

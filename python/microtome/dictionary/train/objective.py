"""The loss of a batch for each architecture, with what the run keeps count of.

All losses are per row, in units of the variance of the rows: reconstruction ``‖x − x̂‖² / Var`` plus

* ``topk``, ``batch_topk``: ``α ‖e − ê‖² / ‖e‖²``, the residual explained by dead features (AuxK, Gao et al.,
arXiv 2406.04093); * ``jumprelu``: ``λ (L0 / k − 1)²`` with straight-through gradients for the thresholds
(Rajamanoharan et al., arXiv 2407.14435); * ``relu``: ``λ Σ f ‖W_dec,f‖ / Var`` (Anthropic's April update);
* ``gated``: the same on the gate, and the gate's own reconstruction (Rajamanoharan et al., arXiv 2404.16014).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from microtome.dictionary.recipe import Recipe
from microtome.dictionary.train.config import TrainConfig
from microtome.dictionary.train.sparse import preactivations, topk_autoencode

__all__ = ["Step", "decoder_norms", "objective"]

_SPARSITY = {"jumprelu": 1.0, "relu": 5.0, "gated": 5.0}


class Step(NamedTuple):
    """The loss of a batch and what it says about the features."""

    loss: Tensor
    """A scalar with gradients."""
    fired: Tensor
    """Which features fired, ``(d_sae,)`` bool."""
    floor: Tensor | None
    """The least score that was selected (``batch_topk``)."""


def objective(
    weights: Mapping[str, Tensor],
    x: Tensor,
    recipe: Recipe,
    config: TrainConfig,
    k: int,
    dead: Tensor | None,
    variance: float,
    parts: int = 1,
) -> Step:
    """The loss of scaled rows ``x (n, d)``.

    Args:
        weights: ``encoder (d_sae, d)`` = ``W_encᵀ``, ``W_dec``, biases, ``log_threshold``.
        x: rows times the input scale.
        recipe: how the dictionary is read.
        config: what the run was told.
        k: features per row at this step.
        dead: mask of dead features, or None when AuxK has nothing to do.
        variance: variance of the scaled rows, the sum over dimensions.
        parts: models that a row is put together from; a decoder norm is the sum of its parts' norms.
    """
    u = x - weights["b_dec"] if recipe.apply_b_dec_to_input else x
    half = config.autocast is not None
    if recipe.activation == "topk":
        norms = decoder_norms(weights["W_dec"].detach(), parts) if recipe.norm_aware else None
        out, values, indices = topk_autoencode(
            u, weights["encoder"], weights["b_enc"], weights["W_dec"], k, norms, half
        )
        fired = torch.zeros(len(weights["W_dec"]), dtype=torch.bool, device=x.device)
        fired[indices[values > 0]] = True
        error = x - out - weights["b_dec"]
        step = Step(error.square().sum(1).mean() / variance, fired, None)
    else:
        step, error = _dense(weights, x, u, recipe, config, k, variance, parts)
    if dead is not None and bool(dead.any()) and recipe.activation in ("topk", "batch_topk"):
        aux = _auxk(weights, u, error.detach(), dead, config)
        step = step._replace(loss=step.loss + config.auxk_alpha * aux)
    return step


def decoder_norms(W_dec: Tensor, parts: int) -> Tensor:
    """``Σ_m ‖W_dec,f^m‖`` over the models of a row ``(d_sae,)``; the plain norm for one."""
    return W_dec.unflatten(1, (parts, -1)).norm(dim=2).sum(1)


def _dense(
    weights: Mapping[str, Tensor],
    x: Tensor,
    u: Tensor,
    recipe: Recipe,
    config: TrainConfig,
    k: int,
    variance: float,
    parts: int,
) -> tuple[Step, Tensor]:
    gated = recipe.activation == "gated"
    bias = weights["b_gate" if gated else "b_enc"]
    pre = preactivations(u, weights["encoder"], bias, config.autocast is not None)
    norms = decoder_norms(weights["W_dec"], parts)
    penalty, floor = pre.new_zeros(()), None
    sparsity = config.sparsity if config.sparsity is not None else _SPARSITY.get(recipe.activation, 0.0)
    if recipe.activation == "batch_topk":
        codes, floor = _batch_topk(pre, norms.detach() if recipe.norm_aware else None, k)
    elif recipe.activation == "jumprelu":
        threshold = weights["log_threshold"].exp()
        codes = _JumpReLU.apply(pre, threshold, config.bandwidth)
        l0 = _Heaviside.apply(pre, threshold, config.bandwidth).sum(1).mean()
        penalty = sparsity * (l0 / k - 1).square()
    elif gated:
        magnitude = (pre - bias) * weights["r_mag"].exp() + weights["b_mag"]
        codes = magnitude.relu() * (pre > 0)
        gate = pre.relu()
        seen = gate @ weights["W_dec"].detach() + weights["b_dec"].detach()
        penalty = sparsity * (gate * norms.detach()).sum(1).mean() / variance
        penalty = penalty + (x - seen).square().sum(1).mean() / variance
    else:
        codes = pre.relu()
        penalty = sparsity * (codes * norms).sum(1).mean() / variance
    error = x - codes @ weights["W_dec"] - weights["b_dec"]
    loss = error.square().sum(1).mean() / variance + penalty
    return Step(loss, (codes > 0).any(0), floor), error


def _batch_topk(pre: Tensor, norms: Tensor | None, k: int) -> tuple[Tensor, Tensor]:
    """Codes of the ``k n`` largest positive scores of the batch, and the least of them."""
    score = pre.detach() if norms is None else pre.detach() * norms
    least = torch.topk(score.flatten(), min(k * len(pre), score.numel()), sorted=True).values[-1].clamp(min=0)
    chosen = (score >= least) & (score > 0)
    return pre.relu() * chosen, least


def _auxk(
    weights: Mapping[str, Tensor], u: Tensor, residual: Tensor, dead: Tensor, config: TrainConfig
) -> Tensor:
    """``‖e − ê‖² / ‖e‖²``, where ``ê`` is written by the best dead features of every row."""
    k_aux = config.auxk_k or max(1, residual.shape[1] // 2)
    n_dead = int(dead.sum())
    pre = u @ weights["encoder"][dead].T + weights["b_enc"][dead]  # (n, n_dead)
    top = torch.topk(pre.detach(), min(k_aux, n_dead), dim=1, sorted=False)
    chosen = torch.zeros_like(pre).scatter_(1, top.indices, 1.0)
    guess = (pre.relu() * chosen) @ weights["W_dec"][dead]
    loss = (residual - guess).square().sum() / residual.square().sum()
    return torch.nan_to_num(loss) * min(1.0, n_dead / k_aux)


class _JumpReLU(torch.autograd.Function):  # type: ignore[misc]  # torch is untyped here
    """``x 1[x > θ]``; the threshold's gradient is ``−θ/ε`` within ``ε/2`` of the jump."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, threshold: Tensor, width: float) -> Tensor:
        ctx.save_for_backward(x, threshold)
        ctx.width = width
        return x * ((x > threshold) & (x > 0))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, threshold = ctx.saved_tensors
        near = ((x - threshold).abs() < ctx.width / 2) * (-threshold / ctx.width)
        return grad * (x > threshold), (near * grad).sum(0), None


class _Heaviside(torch.autograd.Function):  # type: ignore[misc]
    """``1[x > θ]``; the threshold's gradient is ``−1/ε`` within ``ε/2`` of the jump."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, threshold: Tensor, width: float) -> Tensor:
        ctx.save_for_backward(x, threshold)
        ctx.width = width
        return (x > threshold).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor, None]:
        x, threshold = ctx.saved_tensors
        near = ((x - threshold).abs() < ctx.width / 2) * (-1 / ctx.width)
        return None, (near * grad).sum(0), None

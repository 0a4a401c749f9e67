"""Top-K autoencoding as one differentiable operation that never writes a dense gradient of the codes.

Only the k selected features of a row have a gradient. With the selected pairs sorted by feature, the gradient
of either weight matrix is a sum of few rows per feature, which costs n·k·d instead of n·d_sae·d (the sparse
kernels of Gao et al., arXiv 2406.04093).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["preactivations", "topk_autoencode"]


def preactivations(u: Tensor, encoder: Tensor, bias: Tensor, half: bool) -> Tensor:
    """``u encoderᵀ + bias``, ``(n, d_sae)`` float32; the product in bfloat16 where ``half``.

    Args:
        u: rows ``(n, d_in)``.
        encoder: ``W_encᵀ (d_sae, d_in)``.
        bias: ``(d_sae,)``.
        half: whether the product is taken in bfloat16.
    """
    if half:
        return (u.bfloat16() @ encoder.bfloat16().T).float() + bias
    return torch.addmm(bias, u, encoder.T)


def topk_autoencode(
    u: Tensor, encoder: Tensor, b_enc: Tensor, W_dec: Tensor, k: int, norms: Tensor | None, half: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes of the k largest positive scores, and what they write.

    Args:
        u: rows ``(n, d_in)`` as they meet the encoder.
        encoder: ``W_encᵀ (d_sae, d_in)``.
        b_enc: ``(d_sae,)``.
        W_dec: ``(d_sae, d_out)``.
        k: features per row.
        norms: ``(d_sae,)`` where features are ranked by pre-activation times norm.
        half: whether the encoder's product is taken in bfloat16.

    Returns:
        ``Σ f W_dec (n, d_out)``, values ``(n, k)`` and indices ``(n, k)``; gradients flow through the first
        alone.
    """
    return _TopKAutoencode.apply(u, encoder, b_enc, W_dec, k, norms, half)  # type: ignore[no-any-return]


class _TopKAutoencode(torch.autograd.Function):  # type: ignore[misc]  # torch is untyped here
    @staticmethod
    def forward(
        ctx: Any,
        u: Tensor,
        encoder: Tensor,
        b_enc: Tensor,
        W_dec: Tensor,
        k: int,
        norms: Tensor | None,
        half: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        pre = preactivations(u, encoder, b_enc, half)
        score = pre if norms is None else pre * norms
        chosen, indices = torch.topk(score, k, dim=1, sorted=False)
        values = (chosen if norms is None else pre.gather(1, indices)).relu()  # (n, k)
        out = functional.embedding_bag(indices, W_dec, mode="sum", per_sample_weights=values)
        ctx.save_for_backward(u, encoder, W_dec, indices, values)
        ctx.mark_non_differentiable(values, indices)
        return out, values, indices

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        u, encoder, W_dec, indices, values = ctx.saved_tensors
        grad_out = grad_out.contiguous()
        grad_values = _rows_dot(grad_out, W_dec, indices) * (values > 0)  # (n, k)
        by_feature = _ByFeature(indices, len(W_dec))
        grad_decoder = by_feature.sum(grad_out, values)
        grad_encoder = by_feature.sum(u, grad_values)
        grad_bias = torch.bincount(indices.flatten(), grad_values.flatten(), minlength=len(W_dec))
        grad_u = None
        if ctx.needs_input_grad[0]:
            grad_u = functional.embedding_bag(indices, encoder, mode="sum", per_sample_weights=grad_values)
        return grad_u, grad_encoder, grad_bias.to(u.dtype), grad_decoder, None, None, None


def _rows_dot(grad_out: Tensor, W_dec: Tensor, indices: Tensor) -> Tensor:
    """``grad_out_n · W_dec[indices_nj]``, ``(n, k)``: the gradient of a weighted bag for its weights."""
    with torch.enable_grad():
        weights = torch.zeros(indices.shape, dtype=grad_out.dtype, device=grad_out.device, requires_grad=True)
        out = functional.embedding_bag(indices, W_dec.detach(), mode="sum", per_sample_weights=weights)
    return torch.autograd.grad(out, weights, grad_out)[0]


class _ByFeature:
    """The pairs (row, feature) sorted by feature, so that sums per feature read their rows in order."""

    def __init__(self, indices: Tensor, d_sae: int) -> None:
        flat = indices.flatten()
        self.order = torch.sort(flat.int(), stable=True).indices
        self.rows = torch.div(self.order, indices.shape[1], rounding_mode="floor")
        counts = torch.bincount(flat, minlength=d_sae)
        self.starts = counts.cumsum(0) - counts

    def sum(self, rows: Tensor, weights: Tensor) -> Tensor:
        """``Σ_n weights[n, f] rows[n]`` per feature, ``(d_sae, d)``."""
        return functional.embedding_bag(
            self.rows, rows, self.starts, mode="sum", per_sample_weights=weights.flatten()[self.order]
        )

"""The tensors of a dictionary: float32, finite, and of shapes that fit together."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from microtome.dictionary.recipe import Recipe
from microtome.errors import CheckpointError, DtypeError, NonFiniteError, ShapeError

__all__ = ["as_tensor", "completed", "rows_of"]

_SHAPES = {  # every tensor a dictionary may have, by the names of its axes
    "W_enc": ("d_in", "d_sae"),
    "W_dec": ("d_sae", "d_out"),
    "b_enc": ("d_sae",),
    "b_dec": ("d_out",),
    "threshold": ("d_sae",),
    "b_gate": ("d_sae",),
    "b_mag": ("d_sae",),
    "r_mag": ("d_sae",),
    "W_skip": ("d_out", "d_in"),
}


def rows_of(x: Any, block_rows: int) -> Iterator[Tensor]:
    """Blocks of rows as tensors, in order, from a tensor, an array or :class:`microtome.Activations`; at least one."""
    if hasattr(x, "blocks") and len(x):
        for block in x.blocks(block_rows):
            yield torch.as_tensor(block)
        return
    for start in range(0, max(len(x), 1), block_rows):
        yield torch.as_tensor(x[start : start + block_rows])


def as_tensor(value: Any, name: str) -> Tensor:
    """A weight as a contiguous float32 tensor; bf16 and f16 widen without loss."""
    tensor = value.detach() if isinstance(value, Tensor) else torch.from_numpy(np.ascontiguousarray(value))
    if not tensor.is_floating_point():
        raise DtypeError(f"{name}: expected floating-point weights, found {tensor.dtype}")
    tensor = tensor.float().contiguous()
    if not torch.isfinite(tensor).all():
        raise NonFiniteError(
            f"{name}: expected finite weights, found {int((~torch.isfinite(tensor)).sum())} NaN or infinite"
        )
    return tensor


def completed(held: dict[str, Tensor], recipe: Recipe) -> dict[str, Tensor]:
    """The tensors with absent biases as zeros, all shapes checked against each other."""
    for name in ("W_enc", "W_dec"):
        if held[name].ndim != 2:
            raise ShapeError(f"{name}: expected a matrix, found shape {tuple(held[name].shape)}")
    W_enc, W_dec = held["W_enc"], held["W_dec"]
    axes = {"d_in": W_enc.shape[0], "d_sae": W_enc.shape[1], "d_out": W_dec.shape[1]}
    biases = ("b_gate", "b_mag", "r_mag") if recipe.activation == "gated" else ("b_enc",)
    if recipe.activation == "gated" and "b_gate" not in held and "b_enc" in held:
        held["b_gate"] = held.pop("b_enc")
    for name in (*biases, "b_dec"):
        held.setdefault(name, W_enc.new_zeros(tuple(axes[axis] for axis in _SHAPES[name])))
    if "threshold" in held and held["threshold"].ndim == 0:
        held["threshold"] = held["threshold"].expand(axes["d_sae"]).contiguous()
    for name, tensor in held.items():
        if name not in _SHAPES:
            raise ShapeError(f"{name}: expected one of {', '.join(_SHAPES)}, found another tensor")
        wanted = tuple(axes[axis] for axis in _SHAPES[name])
        if tuple(tensor.shape) != wanted:
            raise ShapeError(
                f"{name}: expected shape {wanted} beside W_enc {tuple(W_enc.shape)} and "
                f"W_dec {tuple(W_dec.shape)}, found {tuple(tensor.shape)}"
            )
    _check_recipe(held, axes, recipe)
    return held


def _check_recipe(held: Mapping[str, Tensor], axes: Mapping[str, int], recipe: Recipe) -> None:
    if recipe.k is not None and recipe.k > axes["d_sae"]:
        raise ShapeError(f"k: expected at most d_sae = {axes['d_sae']}, found {recipe.k}")
    if recipe.activation == "jumprelu" and "threshold" not in held:
        raise CheckpointError("threshold: expected a threshold for a JumpReLU dictionary, found none")
    if recipe.activation == "batch_topk" and "threshold" not in held and recipe.k is None:
        raise CheckpointError(
            "threshold: expected a threshold or k for a BatchTopK dictionary, found neither"
        )
    if recipe.activation in ("topk", "relu", "gated") and "threshold" in held:
        raise CheckpointError(f"threshold: expected none for a {recipe.activation} dictionary, found one")
    if recipe.apply_b_dec_to_input and axes["d_in"] != axes["d_out"]:
        raise ShapeError(
            f"b_dec: expected width d_in = {axes['d_in']} to be subtracted from the input, "
            f"found {axes['d_out']}"
        )

"""Gemma Scope 2: ``params.safetensors`` with lower-case names beside ``config.json``.

The skip connection is stored ``(d_in, d_out)`` and transposed here.
"""

from __future__ import annotations

from pathlib import Path

from microtome.dictionary.formats.files import Checkpoint, write_json, write_safetensors
from microtome.dictionary.formats.gemma_scope import thresholded
from microtome.dictionary.formats.plain import plain
from microtome.dictionary.parameters import Parameters
from microtome.dictionary.recipe import Recipe
from microtome.errors import CheckpointError

NAME = "gemma_scope_2"

_SKIP = "affine_skip_connection"


def matches(checkpoint: Checkpoint) -> bool:
    """The lower-case names."""
    return checkpoint.has("w_enc", "w_dec", "b_enc", "b_dec", "threshold")


def read(checkpoint: Checkpoint, k: int | None) -> Parameters:
    """The dictionary or transcoder; cross-layer decoders ``(d_sae, layers, d_out)`` are refused."""
    cfg = checkpoint.config("architecture") or {"architecture": "jump_relu"}
    if cfg["architecture"] != "jump_relu" or checkpoint.tensor("w_dec").ndim != 2:
        raise CheckpointError(
            f"architecture: {checkpoint.path}: expected jump_relu with w_dec (d_sae, d_out), "
            f"found {cfg['architecture']} with w_dec {tuple(checkpoint.tensor('w_dec').shape)}"
        )
    tensors = {"threshold": checkpoint.tensor("threshold")}
    if checkpoint.has(_SKIP):
        tensors["W_skip"] = checkpoint.tensor(_SKIP).T
    return Parameters(
        checkpoint.tensor("w_enc"),
        checkpoint.tensor("w_dec"),
        checkpoint.tensor("b_enc"),
        checkpoint.tensor("b_dec"),
        recipe=Recipe(
            activation="jumprelu",
            hook_name=cfg.get("hf_hook_point_in"),
            hook_name_out=cfg.get("hf_hook_point_out"),
            model_name=cfg.get("model_name"),
            source=NAME,
        ),
        tensors=tensors,
    )


def write(sae: Parameters, path: Path) -> Path:
    """JumpReLU, BatchTopK with a threshold, or ReLU as a threshold of zero."""
    made = plain(sae, NAME, ("jumprelu", "batch_topk", "relu"), apply_b_dec_to_input=False)
    tensors = {name.replace("W_", "w_"): tensor for name, tensor in thresholded(made, NAME).items()}
    skip = tensors.pop("w_skip", None)
    if skip is not None:
        tensors[_SKIP] = skip.T
    cfg = {
        "architecture": "jump_relu",
        "model_name": made.recipe.model_name,
        "hf_hook_point_in": made.recipe.hook_name,
        "hf_hook_point_out": made.recipe.hook_name_out,
        "affine_connection": skip is not None,
    }
    write_json(path / "config.json", cfg)
    return write_safetensors(path / "params.safetensors", tensors)

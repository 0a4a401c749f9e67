"""Llamascopium: ``config.json`` with ``sae_type`` beside ``sae_weights.safetensors``, SAELens' name too.

``W_E (d_model, d_sae)`` and ``W_D (d_sae, d_model)`` are in our orientation. The threshold is stored as its
logarithm. The averages behind a dataset-wise normalisation are tensors
``dataset_average_activation_norm.{hook}``.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch

from microtome.dictionary import folds
from microtome.dictionary.formats.files import Checkpoint, write_json, write_safetensors
from microtome.dictionary.formats.plain import refuse_transcoder
from microtome.dictionary.parameters import Parameters
from microtome.dictionary.recipe import Activation, Recipe
from microtome.errors import CheckpointError

NAME = "llamascopium"

_AVERAGE = "dataset_average_activation_norm."
_UNNAMED = "unnamed"  # the average norms need the name of a hook
_LOG_THRESHOLD = "activation_function.log_jumprelu_threshold"
_ACTIVATION: dict[str, Activation] = {
    "relu": "relu",
    "jumprelu": "jumprelu",
    "topk": "topk",
    "batchtopk": "batch_topk",
}


def matches(checkpoint: Checkpoint) -> bool:
    """``W_E`` and ``W_D``."""
    return checkpoint.has("W_E", "W_D")


def read(checkpoint: Checkpoint, k: int | None) -> Parameters:
    """The dictionary; GLU encoders, batch-wise normalisation and other ``sae_type`` are refused."""
    cfg = checkpoint.config("sae_type", "act_fn")
    if cfg is None:
        raise CheckpointError(
            f"configuration: {checkpoint.path}: expected config.json with sae_type and act_fn"
        )
    if cfg["sae_type"] != "sae" or cfg.get("use_glu_encoder") or cfg["act_fn"] not in _ACTIVATION:
        raise CheckpointError(
            f"sae_type: {checkpoint.path}: expected sae with {', '.join(_ACTIVATION)} and no GLU, "
            f"found {cfg['sae_type']} with {cfg['act_fn']}{' and GLU' if cfg.get('use_glu_encoder') else ''}"
        )
    activation = _ACTIVATION[cfg["act_fn"]]
    scales = _scales(checkpoint, cfg)
    tensors: dict[str, Any] = {}
    if activation == "jumprelu":
        tensors["threshold"] = checkpoint.tensor(_LOG_THRESHOLD).float().exp()
    return Parameters(
        checkpoint.tensor("W_E"),
        checkpoint.tensor("W_D"),
        checkpoint.tensor("b_E"),
        checkpoint.tensor("b_D") if cfg.get("use_decoder_bias", True) else None,
        recipe=Recipe(
            activation=activation,
            k=(k or cfg.get("top_k")) if activation in ("topk", "batch_topk") else None,
            norm_aware=bool(cfg.get("sparsity_include_decoder_norm", True)),
            input_scale=scales[0],
            output_scale=scales[1],
            normalize="constant_norm_rescale" if cfg.get("norm_activation") == "token-wise" else "none",
            hook_name=None if cfg.get("hook_point_in") == _UNNAMED else cfg.get("hook_point_in"),
            hook_name_out=None
            if cfg.get("hook_point_out") == cfg.get("hook_point_in")
            else cfg.get("hook_point_out"),
            source=NAME,
            metadata={"top_k": cfg.get("top_k")},
        ),
        tensors=tensors,
    )


def _scales(checkpoint: Checkpoint, cfg: dict[str, Any]) -> tuple[float, float]:
    mode = cfg.get("norm_activation", "dataset-wise")
    if mode in ("inference", "token-wise"):
        return 1.0, 1.0
    if mode != "dataset-wise":
        raise CheckpointError(
            f"norm_activation: {checkpoint.path}: expected dataset-wise, token-wise or inference, "
            f"found {mode!r}"
        )
    root = math.sqrt(cfg["d_model"])
    inside = float(checkpoint.tensor(_AVERAGE + str(cfg["hook_point_in"])))
    outside = float(checkpoint.tensor(_AVERAGE + str(cfg["hook_point_out"])))
    return root / inside, outside / root


def write(sae: Parameters, path: Path) -> Path:
    """Norm-aware scores and scales are kept; a threshold makes it ``jumprelu``."""
    refuse_transcoder(sae, NAME)
    if sae.recipe.activation == "gated" or sae.recipe.normalize == "layer_norm":
        raise CheckpointError(
            f"save_to_disk: llamascopium has no place for {sae.recipe.activation} with "
            f"normalize={sae.recipe.normalize!r}"
        )
    if sae.recipe.rescale_acts_by_decoder_norm:
        sae = sae.fold_W_dec_norm()
    one_hook = sae.recipe.hook_name_out in (None, sae.recipe.hook_name)
    if one_hook and abs(sae.recipe.input_scale * sae.recipe.output_scale - 1) > 1e-12:
        sae = sae.fold_scale()  # one hook has one average norm
    sae = sae.with_tensors(*folds.move_b_dec(sae.tensors, sae.recipe, False))
    recipe = sae.recipe
    hook = recipe.hook_name or _UNNAMED
    names = {ours: theirs for theirs, ours in _ACTIVATION.items()}
    cfg = {
        "sae_type": "sae",
        "hook_point_in": hook,
        "hook_point_out": recipe.hook_name_out or hook,
        "use_glu_encoder": False,
        "d_model": sae.d_in,
        "expansion_factor": sae.d_sae / sae.d_in,
        "use_decoder_bias": True,
        "act_fn": "jumprelu" if sae.threshold is not None else names[recipe.activation],
        "norm_activation": "token-wise" if recipe.normalize != "none" else "dataset-wise",
        "sparsity_include_decoder_norm": recipe.norm_aware,
        "top_k": sae.k or recipe.metadata.get("top_k") or 50,
        "dtype": "torch.float32",
    }
    root = math.sqrt(sae.d_in)
    tensors = {"W_E": sae.W_enc, "b_E": sae.b_enc, "W_D": sae.W_dec, "b_D": sae.b_dec}
    if recipe.normalize == "none":
        tensors[_AVERAGE + hook] = torch.tensor(root / recipe.input_scale)
        tensors.setdefault(_AVERAGE + str(cfg["hook_point_out"]), torch.tensor(root * recipe.output_scale))
    if sae.threshold is not None:
        tiny = torch.finfo(torch.float32).tiny  # a threshold of zero has no logarithm
        tensors[_LOG_THRESHOLD] = sae.threshold.clamp(min=tiny).log()
    write_json(path / "config.json", cfg)
    return write_safetensors(path / "sae_weights.safetensors", tensors)

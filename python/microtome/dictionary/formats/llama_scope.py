"""Llama Scope: ``hyperparams.json`` beside ``checkpoints/final.safetensors``, both matrices transposed.

``x̃ = x · sqrt(d) / average norm``, ``s_f = pre_f · ‖W_dec,f‖``, ``f = pre · 1[s > θ]`` with one θ on the
scaled side (Llama Scope, arXiv 2410.20526; methods of Language-Model-SAEs). A reading that leaves the norm or
the scale out has another L0.
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
from microtome.dictionary.recipe import Recipe
from microtome.errors import CheckpointError

NAME = "llama_scope"

_KEYS = ("d_model", "dataset_average_activation_norm", "act_fn")
_TENSORS = ("encoder.weight", "encoder.bias", "decoder.weight")


def matches(checkpoint: Checkpoint) -> bool:
    """Linear layers beside a configuration with the dataset's average norm."""
    return checkpoint.has(*_TENSORS) and checkpoint.config(*_KEYS) is not None


def read(checkpoint: Checkpoint, k: int | None) -> Parameters:
    """The dictionary with θ per feature, scales and norm-aware scores as the hyper-parameters say."""
    cfg = checkpoint.config(*_KEYS)
    if cfg is None:
        raise CheckpointError(
            f"configuration: {checkpoint.path}: expected hyperparams.json with {', '.join(_KEYS)}"
        )
    act_fn = cfg["act_fn"]
    if act_fn not in ("jumprelu", "topk", "relu") or cfg.get("use_glu_encoder"):
        raise CheckpointError(
            f"act_fn: {checkpoint.path}: expected jumprelu, topk or relu without GLU, found {act_fn!r}"
        )
    input_scale, output_scale = _scales(cfg, checkpoint.path)
    tensors: dict[str, Any] = {}
    if act_fn == "jumprelu":
        tensors["threshold"] = torch.tensor(float(cfg["jump_relu_threshold"]))
    bias = checkpoint.tensors.get("decoder.bias") if cfg.get("use_decoder_bias", True) else None
    return Parameters(
        checkpoint.tensor("encoder.weight").T,
        checkpoint.tensor("decoder.weight").T,
        checkpoint.tensor("encoder.bias"),
        bias,
        recipe=Recipe(
            activation=act_fn,
            k=(k or cfg.get("top_k")) if act_fn == "topk" else None,
            apply_b_dec_to_input=bool(cfg.get("apply_decoder_bias_to_pre_encoder", False)),
            norm_aware=bool(cfg.get("sparsity_include_decoder_norm", False)),
            input_scale=input_scale,
            output_scale=output_scale,
            hook_name=cfg.get("hook_point_in"),
            hook_name_out=_other(cfg),
            model_name=cfg.get("model_name"),
            source=NAME,
            metadata={"top_k": cfg.get("top_k")},
        ),
        tensors=tensors,
    )


def _scales(cfg: dict[str, Any], path: Path) -> tuple[float, float]:
    mode = cfg.get("norm_activation", "dataset-wise")
    if mode in ("inference", "none"):
        return 1.0, 1.0
    if mode != "dataset-wise":
        raise CheckpointError(f"norm_activation: {path}: expected dataset-wise or inference, found {mode!r}")
    norms = cfg["dataset_average_activation_norm"]
    root = math.sqrt(cfg["d_model"])
    return root / norms["in"], norms["out"] / root


def _other(cfg: dict[str, Any]) -> str | None:
    out = cfg.get("hook_point_out")
    return None if out == cfg.get("hook_point_in") else out


def write(sae: Parameters, path: Path) -> Path:
    """Norms and scales are kept as they are; θ must be one number on the scale of the scores."""
    refuse_transcoder(sae, NAME)
    recipe = sae.recipe
    if recipe.activation not in ("jumprelu", "topk", "relu") or recipe.normalize != "none":
        raise CheckpointError(
            f"save_to_disk: llama_scope holds jumprelu, topk and relu without row normalisation, "
            f"found {recipe.activation} with normalize={recipe.normalize!r}"
        )
    if recipe.rescale_acts_by_decoder_norm:
        sae = sae.fold_W_dec_norm()
    sae = sae.with_tensors(*folds.move_b_dec(sae.tensors, sae.recipe, False))
    root = math.sqrt(sae.d_in)
    cfg = {
        "d_model": sae.d_in,
        "d_sae": sae.d_sae,
        "act_fn": recipe.activation,
        "jump_relu_threshold": _one_threshold(sae),
        "top_k": sae.k or recipe.metadata.get("top_k"),
        "norm_activation": "dataset-wise",
        "dataset_average_activation_norm": {
            "in": root / sae.recipe.input_scale,
            "out": root * sae.recipe.output_scale,
        },
        "sparsity_include_decoder_norm": sae.recipe.norm_aware,
        "use_decoder_bias": True,
        "apply_decoder_bias_to_pre_encoder": False,
        "use_glu_encoder": False,
        "hook_point_in": recipe.hook_name,
        "hook_point_out": recipe.hook_name_out or recipe.hook_name,
        "model_name": recipe.model_name,
    }
    write_json(path / "hyperparams.json", cfg)
    return write_safetensors(
        path / "checkpoints" / "final.safetensors",
        {
            "encoder.weight": sae.W_enc.T,
            "encoder.bias": sae.b_enc,
            "decoder.weight": sae.W_dec.T,
            "decoder.bias": sae.b_dec,
        },
    )


def _one_threshold(sae: Parameters) -> float:
    if sae.threshold is None:
        return 0.0
    first = sae.threshold[0]
    if not bool((sae.threshold == first).all()):
        raise CheckpointError(
            "save_to_disk: llama_scope holds one threshold for all features, found one per feature"
        )
    return float(first)

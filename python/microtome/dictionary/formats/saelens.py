"""SAELens: ``cfg.json`` beside ``sae_weights.safetensors``. Tensors are in our orientation already.

Configurations from before version 6 use other names and leave ``apply_b_dec_to_input`` out, which then means
True. ``expected_average_only_in`` stands for a scale that no file holds: such a file is refused until the
scale is folded in.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch

from microtome.dictionary.formats.files import Checkpoint, write_json, write_safetensors
from microtome.dictionary.formats.plain import plain
from microtome.dictionary.parameters import Parameters
from microtome.dictionary.recipe import Activation, Normalize, Recipe
from microtome.errors import CheckpointError

NAME = "saelens"

_WEIGHTS_FILE = "sae_weights.safetensors"
_WRITER = "6.54.12"  # the configuration is spelled as this version of SAELens reads it
_ACTIVATION: dict[str, Activation] = {
    "standard": "relu",
    "topk": "topk",
    "jumprelu": "jumprelu",
    "gated": "gated",
    "transcoder": "relu",
    "skip_transcoder": "relu",
    "jumprelu_transcoder": "jumprelu",
    "jumprelu_skip_transcoder": "jumprelu",
}
_OLD_NAMES = {"hook_point": "hook_name", "activation_fn_str": "activation_fn"}
_ONLY_OURS = ("normalize", "source")


def matches(checkpoint: Checkpoint) -> bool:
    """``W_enc`` and ``W_dec`` beside a configuration with ``d_in`` and ``d_sae``, not of our own file."""
    cfg = checkpoint.config("d_in", "d_sae")
    return (
        cfg is not None and checkpoint.has("W_enc", "W_dec") and "microtome.recipe" not in checkpoint.metadata
    )


def read(checkpoint: Checkpoint, k: int | None) -> Parameters:
    """The dictionary; every field of the configuration that changes codes is obeyed or refused."""
    found = checkpoint.config("d_in", "d_sae")
    if found is None:
        raise CheckpointError(
            f"configuration: {checkpoint.path}: expected cfg.json with d_in and d_sae, found none"
        )
    cfg = _current(found)
    architecture = cfg["architecture"]
    if architecture not in _ACTIVATION:
        raise CheckpointError(
            f"architecture: {checkpoint.path}: expected one of {', '.join(_ACTIVATION)}, found "
            f"{architecture!r}"
        )
    tensors = {name: tensor for name, tensor in checkpoint.tensors.items() if name not in ("W_enc", "W_dec")}
    _drop_unit_scale(tensors, checkpoint.path)
    if _ACTIVATION[architecture] == "gated":
        tensors.pop("b_enc", None)
    sae = Parameters(
        checkpoint.tensor("W_enc"),
        checkpoint.tensor("W_dec"),
        recipe=_recipe(cfg, checkpoint.path, k),
        tensors=tensors,
    )
    if (sae.d_in, sae.d_sae) != (cfg["d_in"], cfg["d_sae"]):
        raise CheckpointError(
            f"shapes: {checkpoint.path}: expected (d_in, d_sae) = {(cfg['d_in'], cfg['d_sae'])} of the "
            "configuration, "
            f"found W_enc {(sae.d_in, sae.d_sae)}"
        )
    return sae


def _current(cfg: dict[str, Any]) -> dict[str, Any]:
    """A configuration in the spelling of version 6."""
    meta = cfg.get("metadata") or {}
    version = str(cfg.get("sae_lens_version") or meta.get("sae_lens_version") or "0")
    if version.split(".")[0].isdigit() and int(version.split(".")[0]) >= 6:
        return {"architecture": "standard", **cfg}
    old = {_OLD_NAMES.get(name, name): value for name, value in cfg.items()}
    old = {"apply_b_dec_to_input": True, "architecture": "standard", **old}
    kwargs = old.get("activation_fn_kwargs") or {}
    if old.get("activation_fn") == "topk" and kwargs.get("k") is not None:
        old.update(architecture="topk", k=kwargs["k"])
    elif old.get("activation_fn", "relu") != "relu":
        raise CheckpointError(f"activation_fn: expected relu or topk, found {old['activation_fn']!r}")
    if isinstance(old.get("normalize_activations"), bool):
        old["normalize_activations"] = "expected_average_only_in" if old["normalize_activations"] else "none"
    names = ("model_name", "hook_name", "hook_name_out", "prepend_bos", "context_size", "dataset_path")
    old["metadata"] = {name: old[name] for name in names if name in old} | (old.get("metadata") or {})
    return old


def _recipe(cfg: dict[str, Any], path: Path, k: int | None) -> Recipe:
    normalize = cfg.get("normalize_activations") or "none"
    if normalize not in ("none", "layer_norm", "constant_norm_rescale"):
        raise CheckpointError(
            f"normalize_activations: {path}: expected none, layer_norm or constant_norm_rescale, found "
            f"{normalize!r}, "
            "whose factors are not in the file. Fold them in with SAELens and save again"
        )
    meta = dict(cfg.get("metadata") or {})
    architecture = cfg["architecture"]
    return Recipe(
        activation=_ACTIVATION[architecture],
        k=(k or cfg["k"]) if architecture == "topk" else None,
        relu="after_topk",
        apply_b_dec_to_input="transcoder" not in architecture and bool(cfg.get("apply_b_dec_to_input", True)),
        rescale_acts_by_decoder_norm=bool(cfg.get("rescale_acts_by_decoder_norm", False)),
        normalize=cast("Normalize", normalize),
        hook_name=meta.pop("hook_name", None),
        hook_name_out=meta.pop("hook_name_out", None),
        model_name=meta.pop("model_name", None),
        source=NAME,
        metadata={**meta, "reshape_activations": cfg.get("reshape_activations", "none")},
    )


def _drop_unit_scale(tensors: dict[str, torch.Tensor], path: Path) -> None:
    scale = tensors.pop("scaling_factor", None)
    if scale is not None and not torch.equal(scale.float(), torch.ones_like(scale, dtype=torch.float32)):
        raise CheckpointError(
            f"scaling_factor: {path}: expected ones, found others. Fold the fine-tuning factor first"
        )


def write(sae: Parameters, path: Path) -> Path:
    """Scale folded in; the codes of a norm-aware Top-K are then times the decoder norms.

    SAELens says so by ``rescale_acts_by_decoder_norm``, for rows that it does not normalise; for others the norms are
    in the weights.
    """
    transcoder = sae.d_in != sae.d_out or "W_skip" in sae.tensors
    recipe = sae.recipe
    if recipe.normalize == "none" and recipe.norm_aware and sae.slots is not None:
        rescaled = sae.fold_scale()
        made = rescaled.with_tensors(
            rescaled.tensors, rescaled.recipe.replace(rescale_acts_by_decoder_norm=True)
        )
    else:
        apply_b_dec = recipe.apply_b_dec_to_input and not transcoder
        every = ("topk", "batch_topk", "jumprelu", "relu", "gated")
        made = plain(sae, NAME, every, apply_b_dec_to_input=apply_b_dec, keep_normalize=True)
    architecture = _architecture(made, transcoder)
    cfg = {
        "architecture": architecture,
        "d_in": made.d_in,
        "d_sae": made.d_sae,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": made.recipe.apply_b_dec_to_input,
        "normalize_activations": made.recipe.normalize,
        "reshape_activations": made.recipe.metadata.get("reshape_activations", "none"),
        "metadata": {
            **{name: v for name, v in made.recipe.metadata.items() if name != "reshape_activations"},
            "model_name": made.recipe.model_name,
            "hook_name": made.recipe.hook_name,
            "sae_lens_version": _WRITER,
        },
    }
    if transcoder:
        cfg["d_out"] = made.d_out
        cast("dict[str, Any]", cfg["metadata"])["hook_name_out"] = made.recipe.hook_name_out
    if architecture == "topk":
        cfg["k"] = made.k
        cfg["rescale_acts_by_decoder_norm"] = made.recipe.rescale_acts_by_decoder_norm
    write_json(path / "cfg.json", cfg)
    return write_safetensors(path / _WEIGHTS_FILE, made.tensors)


def _architecture(sae: Parameters, transcoder: bool) -> str:
    threshold = sae.threshold is not None
    if not transcoder:
        return {"relu": "standard", "gated": "gated"}.get(
            sae.recipe.activation, "jumprelu" if threshold else "topk"
        )
    if sae.recipe.activation == "gated" or (
        sae.recipe.activation in ("topk", "batch_topk") and not threshold
    ):
        raise CheckpointError(
            f"save_to_disk: saelens holds ReLU and JumpReLU transcoders, found {sae.recipe.activation}"
        )
    return ("jumprelu_" if threshold else "") + ("skip_" if "W_skip" in sae.tensors else "") + "transcoder"

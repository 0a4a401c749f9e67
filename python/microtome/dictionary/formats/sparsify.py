"""EleutherAI sparsify: ``cfg.json`` beside ``sae.safetensors``.

``encoder.weight`` is ``(d_sae, d_in)`` and transposed here, ``W_dec`` is ``(d_sae, d_out)`` already.
``b_dec`` is subtracted from the input unless ``transcode``. ``num_latents`` 0 means ``d_in ·
expansion_factor``.
"""

from __future__ import annotations

from pathlib import Path

from microtome.dictionary.formats.files import Checkpoint, write_json, write_safetensors
from microtome.dictionary.formats.plain import plain, refuse_transcoder
from microtome.dictionary.parameters import Parameters
from microtome.dictionary.recipe import Recipe
from microtome.errors import CheckpointError

NAME = "sparsify"


def matches(checkpoint: Checkpoint) -> bool:
    """``encoder.weight`` beside a bare ``W_dec``."""
    return checkpoint.has("encoder.weight", "W_dec")


def read(checkpoint: Checkpoint, k: int | None) -> Parameters:
    """The dictionary; ``groupmax`` and signed Top-K, which no Top-K equals, are refused."""
    cfg = checkpoint.config("d_in", "k")
    if cfg is None:
        raise CheckpointError(
            f"configuration: {checkpoint.path}: expected cfg.json with d_in and k, found none"
        )
    if cfg.get("activation", "topk") != "topk" or cfg.get("signed", False):
        raise CheckpointError(
            f"activation: {checkpoint.path}: expected an unsigned topk, found {cfg.get('activation', 'topk')}"
            f"{' signed' if cfg.get('signed') else ''}"
        )
    skip = {"W_skip": checkpoint.tensor("W_skip")} if checkpoint.has("W_skip") else {}
    sae = Parameters(
        checkpoint.tensor("encoder.weight").T,
        checkpoint.tensor("W_dec"),
        checkpoint.tensor("encoder.bias"),
        checkpoint.tensor("b_dec"),
        recipe=Recipe(
            activation="topk",
            k=k or int(cfg["k"]),
            relu="before_topk",
            apply_b_dec_to_input=not cfg.get("transcode", False),
            hook_name=cfg.get("hook_name"),
            hook_name_out=cfg.get("hook_name_out"),
            model_name=cfg.get("model_name"),
            source=NAME,
            metadata={name: cfg[name] for name in ("normalize_decoder", "multi_topk") if name in cfg},
        ),
        tensors=skip,
    )
    wanted = cfg.get("num_latents") or cfg["d_in"] * cfg.get("expansion_factor", 0)
    if (sae.d_in, sae.d_sae) != (cfg["d_in"], wanted):
        raise CheckpointError(
            f"shapes: {checkpoint.path}: expected (d_in, d_sae) = {(cfg['d_in'], wanted)} of the "
            "configuration, "
            f"found encoder.weight for {(sae.d_in, sae.d_sae)}"
        )
    return sae


def write(sae: Parameters, path: Path) -> Path:
    """A Top-K dictionary of equal widths; one with a skip connection is written as ``transcode``."""
    transcode = "W_skip" in sae.tensors or sae.recipe.hook_name_out is not None
    refuse_transcoder(sae, NAME, skip=True)
    made = plain(sae, NAME, ("topk",), apply_b_dec_to_input=not transcode)
    cfg = {
        "activation": "topk",
        "expansion_factor": made.d_sae // made.d_in,
        "normalize_decoder": bool(made.recipe.metadata.get("normalize_decoder", False)),
        "num_latents": made.d_sae,
        "k": made.k,
        "multi_topk": bool(made.recipe.metadata.get("multi_topk", False)),
        "skip_connection": "W_skip" in made.tensors,
        "transcode": transcode,
        "d_in": made.d_in,
        **{
            name: getattr(made.recipe, name)
            for name in ("hook_name", "hook_name_out", "model_name")
            if getattr(made.recipe, name)
        },
    }
    write_json(path / "cfg.json", cfg)
    tensors = {
        "encoder.weight": made.W_enc.T,
        "encoder.bias": made.b_enc,
        "W_dec": made.W_dec,
        "b_dec": made.b_dec,
    }
    if "W_skip" in made.tensors:
        tensors["W_skip"] = made.tensors["W_skip"]
    return write_safetensors(path / "sae.safetensors", tensors)

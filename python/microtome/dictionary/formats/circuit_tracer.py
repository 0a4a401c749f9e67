"""circuit-tracer's per-layer transcoders: ``layer_{i}.safetensors``, ``W_enc (d_sae, d_in)`` transposed here.

JumpReLU where ``activation_function.threshold`` is there, else ReLU. No file beside it says so: the shapes
do.
"""

from __future__ import annotations

import re
from pathlib import Path

from microtome.dictionary.formats.files import Checkpoint, write_safetensors
from microtome.dictionary.formats.plain import file_of_layer, plain
from microtome.dictionary.parameters import Parameters
from microtome.dictionary.recipe import Recipe
from microtome.errors import CheckpointError

NAME = "circuit_tracer"

_THRESHOLD = "activation_function.threshold"
_KNOWN = {"W_enc", "W_dec", "b_enc", "b_dec", "W_skip", _THRESHOLD}


def matches(checkpoint: Checkpoint) -> bool:
    """The four names with features first in both matrices, and no other names."""
    if not checkpoint.has("W_enc", "W_dec", "b_enc", "b_dec") or set(checkpoint.tensors) - _KNOWN:
        return False
    W_enc, d_sae = checkpoint.tensors["W_enc"], len(checkpoint.tensors["b_enc"])
    features_first = W_enc.shape[0] == d_sae == checkpoint.tensors["W_dec"].shape[0]
    ours = "microtome.recipe" in checkpoint.metadata
    return (
        features_first and W_enc.shape[1] != d_sae and not ours and checkpoint.path.suffix == ".safetensors"
    )


def read(checkpoint: Checkpoint, k: int | None) -> Parameters:
    """The transcoder."""
    tensors = {"W_skip": checkpoint.tensor("W_skip")} if checkpoint.has("W_skip") else {}
    if checkpoint.has(_THRESHOLD):
        tensors["threshold"] = checkpoint.tensor(_THRESHOLD)
    layer = re.search(r"layer_(\d+)", checkpoint.path.name)
    return Parameters(
        checkpoint.tensor("W_enc").T,
        checkpoint.tensor("W_dec"),
        checkpoint.tensor("b_enc"),
        checkpoint.tensor("b_dec"),
        recipe=Recipe(
            activation="jumprelu" if "threshold" in tensors else "relu",
            hook_name=f"blocks.{layer.group(1)}.hook_mlp_in" if layer else None,
            hook_name_out=f"blocks.{layer.group(1)}.hook_mlp_out" if layer else None,
            source=NAME,
        ),
        tensors=tensors,
    )


def write(sae: Parameters, path: Path) -> Path:
    """ReLU, JumpReLU, or BatchTopK with a threshold."""
    made = plain(sae, NAME, ("relu", "jumprelu", "batch_topk"), apply_b_dec_to_input=False)
    if made.recipe.activation == "batch_topk" and made.threshold is None:
        raise CheckpointError("save_to_disk: circuit_tracer holds thresholds, found batch_topk without one")
    file = path / file_of_layer(made, NAME, "hook_mlp_in", "layer_{}.safetensors")
    names = {"threshold": _THRESHOLD}
    tensors = {names.get(name, name): tensor for name, tensor in made.tensors.items()}
    tensors["W_enc"] = made.W_enc.T
    return write_safetensors(file, tensors)

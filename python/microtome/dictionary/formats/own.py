"""microtome's own format: one safetensors file, tensors by SAELens' names, the whole recipe in its header."""

from __future__ import annotations

import json
from pathlib import Path

from microtome.dictionary.formats.files import Checkpoint, write_safetensors
from microtome.dictionary.parameters import Parameters
from microtome.dictionary.recipe import Recipe
from microtome.errors import CheckpointError

NAME = "microtome"

_FILE = "dictionary.safetensors"
_PREFIX = "microtome."
_FORMAT = 1


def matches(checkpoint: Checkpoint) -> bool:
    """The header says so."""
    return f"{_PREFIX}recipe" in checkpoint.metadata


def read(checkpoint: Checkpoint, k: int | None) -> Parameters:
    """Tensors, recipe and probe rows; the fingerprint is checked."""
    meta = checkpoint.metadata
    version = meta.get(f"{_PREFIX}format")
    if version != str(_FORMAT):
        raise CheckpointError(f"dictionary format: {checkpoint.path}: expected {_FORMAT}, found {version}")
    recipe = Recipe.from_dict(json.loads(meta[f"{_PREFIX}recipe"]))
    tensors = dict(checkpoint.tensors)
    probe = tensors.pop("probe", None)
    checkpoint.tensor("W_enc"), checkpoint.tensor("W_dec")
    sae = Parameters(tensors.pop("W_enc"), tensors.pop("W_dec"), recipe=recipe, tensors=tensors)
    if sae.fingerprint() != meta.get(f"{_PREFIX}fingerprint"):
        raise CheckpointError(
            f"damaged dictionary: {checkpoint.path}: expected fingerprint "
            f"{meta.get(f'{_PREFIX}fingerprint')}, "
            f"found {sae.fingerprint()}"
        )
    if probe is not None:
        targets = json.loads(meta[f"{_PREFIX}probe"])
        sae.probe, sae.probe_targets = probe, {name: float(value) for name, value in targets.items()}
    return sae


def write(sae: Parameters, path: Path) -> Path:
    """Everything in one file."""
    tensors = dict(sae.tensors)
    meta = {
        f"{_PREFIX}format": str(_FORMAT),
        f"{_PREFIX}recipe": json.dumps(sae.recipe.to_dict()),
        f"{_PREFIX}fingerprint": sae.fingerprint(),
    }
    if sae.probe is not None:
        tensors["probe"] = sae.probe
        meta[f"{_PREFIX}probe"] = json.dumps(sae.probe_targets)
    return write_safetensors(path / _FILE, tensors, meta)

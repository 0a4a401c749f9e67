"""Gemma Scope 1: ``params.npz``, JumpReLU, in our orientation; ``b_dec`` is not subtracted from the input."""

from __future__ import annotations

from pathlib import Path

import torch

from microtome.dictionary.formats.files import Checkpoint, write_npz
from microtome.dictionary.formats.plain import plain, refuse_transcoder
from microtome.dictionary.parameters import Parameters
from microtome.dictionary.recipe import Recipe
from microtome.errors import CheckpointError

__all__ = ["NAME", "matches", "read", "thresholded", "write"]

NAME = "gemma_scope"


def matches(checkpoint: Checkpoint) -> bool:
    """A NumPy archive of the five arrays."""
    return checkpoint.path.suffix == ".npz" and checkpoint.has(
        "W_enc", "W_dec", "b_enc", "b_dec", "threshold"
    )


def read(checkpoint: Checkpoint, k: int | None) -> Parameters:
    """The dictionary, or the transcoder where the widths differ."""
    names = ("W_enc", "W_dec", "b_enc", "b_dec")
    return Parameters(
        *(checkpoint.tensor(name) for name in names),
        recipe=Recipe(activation="jumprelu", source=NAME),
        tensors={"threshold": checkpoint.tensor("threshold")},
    )


def write(sae: Parameters, path: Path) -> Path:
    """JumpReLU, BatchTopK with a threshold, or ReLU as a threshold of zero."""
    refuse_transcoder(sae, NAME)
    made = plain(sae, NAME, ("jumprelu", "batch_topk", "relu"), apply_b_dec_to_input=False)
    return write_npz(path / "params.npz", thresholded(made, NAME))


def thresholded(sae: Parameters, form: str) -> dict[str, torch.Tensor]:
    """The tensors with a threshold: the dictionary's, or zeros for a ReLU."""
    if sae.threshold is None and sae.recipe.activation != "relu":
        raise CheckpointError(
            f"save_to_disk: {form} holds thresholds, found a {sae.recipe.activation} dictionary without one. "
            "Convert it with to_jumprelu(x)"
        )
    return {"threshold": torch.zeros_like(sae.b_enc), **sae.tensors}

"""Goodfire: a ``.pth`` with ``encoder_linear`` and ``decoder_linear``, both transposed here.

ReLU; ``b_dec`` is not subtracted from the input.
"""

from __future__ import annotations

from pathlib import Path

from microtome.dictionary.formats.files import Checkpoint, write_pickle
from microtome.dictionary.formats.plain import plain, refuse_transcoder
from microtome.dictionary.parameters import Parameters
from microtome.dictionary.recipe import Recipe

NAME = "goodfire"

_NAMES = {"W_enc": "encoder_linear.weight", "W_dec": "decoder_linear.weight"}
_BIASES = {"b_enc": "encoder_linear.bias", "b_dec": "decoder_linear.bias"}


def matches(checkpoint: Checkpoint) -> bool:
    """The names of its two layers."""
    return checkpoint.has(*_NAMES.values())


def read(checkpoint: Checkpoint, k: int | None) -> Parameters:
    """The ReLU dictionary."""
    matrices = (checkpoint.tensor(name).T for name in _NAMES.values())
    biases = {ours: checkpoint.tensor(theirs) for ours, theirs in _BIASES.items()}
    return Parameters(*matrices, recipe=Recipe(activation="relu", source=NAME), tensors=biases)


def write(sae: Parameters, path: Path) -> Path:
    """A ReLU dictionary."""
    refuse_transcoder(sae, NAME)
    made = plain(sae, NAME, ("relu",), apply_b_dec_to_input=False)
    content = {theirs: made.tensors[ours].T for ours, theirs in _NAMES.items()}
    content |= {theirs: made.tensors[ours] for ours, theirs in _BIASES.items()}
    return write_pickle(path / "sae.pth", content)

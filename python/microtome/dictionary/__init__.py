"""Dictionaries: sparse autoencoders and transcoders, their file formats and their training."""

from __future__ import annotations

from microtome.tensors import extra

extra("torch", "models")
extra("safetensors", "models")

from microtome.dictionary.crosscoder import Crosscoder, CrosscoderResult, train_crosscoder  # noqa: E402
from microtome.dictionary.recipe import Recipe  # noqa: E402
from microtome.dictionary.sae import SAE  # noqa: E402
from microtome.dictionary.train import (  # noqa: E402
    LayersResult,
    TrainConfig,
    TrainResult,
    train_layers,
    train_sae,
)

__all__ = [
    "SAE",
    "Crosscoder",
    "CrosscoderResult",
    "LayersResult",
    "Recipe",
    "TrainConfig",
    "TrainResult",
    "train_crosscoder",
    "train_layers",
    "train_sae",
]

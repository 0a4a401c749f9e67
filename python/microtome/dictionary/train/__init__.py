"""Training of dictionaries from a store or from memory."""

from microtome.dictionary.train.config import TrainConfig
from microtome.dictionary.train.layers import LayersResult, train_layers
from microtome.dictionary.train.run import TrainResult, train_sae

__all__ = ["LayersResult", "TrainConfig", "TrainResult", "train_layers", "train_sae"]

"""Capture: a running model's activations, streamed into a store.

- :mod:`microtome.capture.models`: where a model keeps its layers, heads, neurons and image tokens.
- :mod:`microtome.capture.points`: one named value of a model, read or replaced.
"""

from microtome.tensors import extra

extra("torch", "models")

from microtome.capture.layers import DecoderLayer, Projection, linear_weight  # noqa: E402
from microtome.capture.models import ModelAdapter, VisionTower, adapt  # noqa: E402
from microtome.capture.points import HookPoint  # noqa: E402

__all__ = ["DecoderLayer", "HookPoint", "ModelAdapter", "Projection", "VisionTower", "adapt", "linear_weight"]

"""Capture: a running model's activations, streamed into a store.

- :mod:`microtome.capture.models`, ``layers``: where a model keeps its layers, heads, neurons and image
  tokens.
- :mod:`microtome.capture.points`: one named value of a model, read or replaced.
- :mod:`microtome.capture.hooks`: the recorder. ``run``, ``rows`` and ``samples`` say what becomes a row,
  ``writer`` takes it to the store on a thread of its own, ``facts`` says what made it.
- :mod:`microtome.capture.data`: the loop over a data set, for the command line.

The module can be called: ``microtome.capture(model, path, hooks)`` is :func:`microtome.capture.capture`.
"""

import sys
import types
from typing import Any

from microtome.tensors import extra

extra("torch", "models")

from microtome.capture.hooks import Recorder, capture  # noqa: E402
from microtome.capture.layers import DecoderLayer, Projection, linear_weight  # noqa: E402
from microtome.capture.models import ModelAdapter, VisionTower, adapt  # noqa: E402
from microtome.capture.points import HookPoint  # noqa: E402

__all__ = [
    "DecoderLayer",
    "HookPoint",
    "ModelAdapter",
    "Projection",
    "Recorder",
    "VisionTower",
    "adapt",
    "capture",
    "linear_weight",
]


class _Callable(types.ModuleType):
    """Importing a submodule binds this module where the public function would be; so it does the same."""

    def __call__(self, *args: Any, **kwargs: Any) -> Recorder:
        return capture(*args, **kwargs)


_Callable.__call__.__wrapped__ = capture  # type: ignore[attr-defined]
_Callable.__call__.__doc__ = capture.__doc__
sys.modules[__name__].__class__ = _Callable

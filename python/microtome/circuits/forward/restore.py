"""A model left as it was found: modes, gradients, random state, attention implementation."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

__all__ = ["attention_implementation", "left_as_found"]


@contextmanager
def left_as_found(model: Any) -> Iterator[None]:
    """Evaluation mode and frozen parameters inside; modes, ``requires_grad`` and random state restored on every exit."""
    training = [(module, module.training) for module in model.modules()]
    grads = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    random = torch.get_rng_state()
    on_gpu = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
    try:
        model.eval()
        for parameter, _ in grads:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter, wanted in grads:
            parameter.requires_grad_(wanted)
        for module, mode in training:
            module.training = mode
        torch.set_rng_state(random)
        if on_gpu is not None:
            torch.cuda.set_rng_state_all(on_gpu)


@contextmanager
def attention_implementation(model: Any, name: str) -> Iterator[None]:
    """``"eager"``, ``"sdpa"`` or a registered name inside; what each part of the model had is restored on every exit."""
    configs = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}
    before = [(c, c._attn_implementation) for c in configs.values() if hasattr(c, "_attn_implementation")]
    try:
        model.set_attn_implementation(name)
        yield
    finally:
        for config, was in before:
            config._attn_implementation_internal = was

"""Calls of the model that capture must know about: ``generate``, and a forward that is left early.

Both are replaced on the one object that is captured, never on its class, and put back on every way out.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from microtome.errors import Error

__all__ = ["Generation", "Stop", "cached_columns", "refuse_compiled", "replaced", "stopping"]


class Stop(BaseException):
    """Ends a forward early; no ``except Exception`` inside of a model holds it up."""

    def __init__(self, owner: object) -> None:
        self.owner = owner


def stopping(forward: Callable[..., Any], owner: object) -> Callable[..., Any]:
    """``forward``, which returns None where ``owner`` stops it."""

    @functools.wraps(forward)
    def stopped(*args: Any, **kwargs: Any) -> Any:
        try:
            return forward(*args, **kwargs)
        except Stop as stop:
            if stop.owner is not owner:
                raise
            return None

    return stopped


class Generation:
    """A call of ``generate``: its prompt, its image, and what ends a sequence."""

    def __init__(self, model: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        if any(kwargs.get(name) is not None for name in ("assistant_model", "prompt_lookup_num_tokens")):
            raise Error(
                "generate: expected plain decoding, found assisted decoding, whose rejected tokens are no "
                "rows"
            )
        given = (*args, kwargs.get("input_ids"), kwargs.get("inputs"))
        prompt = next((x for x in given if isinstance(x, torch.Tensor)), None)
        self.prompt_columns = 0 if prompt is None else prompt.shape[-1]
        self.pixels = kwargs.get("pixel_values")
        self._prompt_mask = kwargs.get("attention_mask")
        configs = (kwargs.get("generation_config"), getattr(model, "generation_config", None))
        self.end_ids: list[int] = []
        for name in ("eos_token_id", "pad_token_id"):
            values = (kwargs.get(name), *(getattr(config, name, None) for config in configs))
            found = next((value for value in values if value is not None), None)
            self.end_ids += [] if found is None else torch.as_tensor(found).flatten().tolist()

    def mask(self, samples: int, columns: int) -> Any:
        """The padding of all columns so far, told from the prompt's mask: all that is generated is tokens."""
        mask = np.ones((samples, columns), bool)
        if isinstance(self._prompt_mask, torch.Tensor) and self._prompt_mask.ndim == 2:
            prompt = self._prompt_mask.bool().cpu().numpy()[:, :columns]
            mask[:, : prompt.shape[1]] = prompt
        return mask


def cached_columns(given: Mapping[str, Any]) -> int:
    """Columns in the cache that a forward is given; transformers calls it ``cache`` from 5.24 on."""
    cache: Any = next(
        (given[name] for name in ("cache", "past_key_values") if given.get(name) is not None), None
    )
    if hasattr(cache, "get_seq_length"):
        return int(cache.get_seq_length())
    return int(cache[0][0].shape[-2]) if cache else 0


def refuse_compiled(model: Any) -> None:
    """Raise where code that was compiled without hooks may run."""
    modules = model.modules() if isinstance(model, torch.nn.Module) else []
    if any(getattr(m, "_compiled_call_impl", None) is not None or hasattr(m, "_orig_mod") for m in modules):
        raise Error(
            "model: expected a model that is not compiled, found torch.compile, whose code may pass hooks "
            "by. Capture the original, or give allow_compiled=True to compile anew with the hooks in place"
        )


@contextmanager
def replaced(model: Any, name: str, function: Callable[..., Any]) -> Iterator[None]:
    """Put ``function`` in a method's place on this object alone."""
    missing = object()
    own = model.__dict__.get(name, missing)
    model.__dict__[name] = function
    try:
        yield
    finally:
        if own is missing:
            model.__dict__.pop(name, None)
        else:
            model.__dict__[name] = own

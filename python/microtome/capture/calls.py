"""Calls of the model that capture must know about: ``generate``, and a forward that is left early.

Both are replaced on the one object that is captured, never on its class, and put back on every way out.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from microtome.errors import Error

__all__ = ["Generation", "Stop", "cached_columns", "refuse_compiled", "replaced", "stopping"]


_POSITIONAL = ("inputs", "generation_config", "logits_processor", "stopping_criteria")
"""The arguments of ``generate`` in their order, as far as capture reads them."""


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
        named = dict(zip(_POSITIONAL, args, strict=False)) | dict(kwargs)
        configs = (named.get("generation_config"), getattr(model, "generation_config", None))
        self.end_ids = _ids("eos_token_id", named, configs)
        if self.end_ids and any(
            _found(name, named, configs) for name in ("stopping_criteria", "stop_strings")
        ):
            # a sequence that these end is padded; otherwise the padding id may be a word like others
            self.end_ids += _ids("pad_token_id", named, configs)

    def mask(self, samples: int, columns: int) -> Any:
        """The padding of all columns so far, told from the prompt's mask: all that is generated is tokens."""
        mask = np.ones((samples, columns), bool)
        if isinstance(self._prompt_mask, torch.Tensor) and self._prompt_mask.ndim == 2:
            prompt = self._prompt_mask.bool().cpu().numpy()[:, :columns]
            mask[:, : prompt.shape[1]] = prompt
        return mask


def _found(name: str, named: Mapping[str, Any], configs: Sequence[Any]) -> Any:
    """An option of ``generate``: what the call names, None included, stands before the configurations."""
    if name in named:
        return named[name]
    return next((value for c in configs if (value := getattr(c, name, None)) is not None), None)


def _ids(name: str, named: Mapping[str, Any], configs: Sequence[Any]) -> list[int]:
    found = _found(name, named, configs)
    return [] if found is None else torch.as_tensor(found).flatten().tolist()


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
